"""A job as a durable workflow: workflow id = job id, one step a stage, taken up after a kill at its unfinished stage.

Source of the engine's traps that are stepped around here: DBOS Transact 3.4. One gateway owns a database file, so the
executor id is fixed and everything that a killed gateway had under way is taken up at the next launch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, SetWorkflowID, StepOptions, WorkflowStatus, WorkflowStatusString
from dbos import error as engine_error

from services.gateway.config import PipelineOptions
from services.gateway.disk import disk_full_is_said
from services.gateway.jobs.domain import Ending, Job, VideoInfo
from services.gateway.jobs.tracker import JobTracker
from services.gateway.pipeline.serializer import JsonSerializer
from shared.errors import DiskFull, OviError, ReferenceLost
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)

PIPELINE_VERSION = "1"
"""Changes with the sequence of steps; unfinished jobs of another version begin again (kept latents are used again)."""
MAX_RECOVERIES = 3
"""How often a job is taken up again after its gateway was stopped under it."""
_MAX_REMAKES = 5
"""How often lost inputs of a denoise are made again before the job fails."""
_APPLICATION = "ovi-gateway"
_EXECUTOR_ID = "gateway"
_QUEUE = "jobs"
_POLL_S = 0.2
_RECONCILE_S = 2.0
_LOOKUP_SIZE = 500

Refs = list[dict[str, Any]]


class Work(Protocol):
    """The stages; see `services.gateway.work`."""

    async def encode_prompt(self, job_id: str) -> Refs: ...

    async def encode_image(self, job_id: str) -> dict[str, Any]: ...

    async def denoise(
        self, job_id: str, embeddings: Sequence[dict[str, Any]], first_frame: dict[str, Any] | None
    ) -> None: ...

    async def decode(self, job_id: str) -> VideoInfo: ...


class _EngineNoise(logging.Filter):
    """Drops the engine's tracebacks about cancelled tasks: cancelling is how jobs are stopped here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Asyncio task cancelled", "Workflow job_"))


class Pipeline:
    """Admits jobs, a few at a time, and carries each to its end. One a process."""

    def __init__(self, database: sa.Engine, tracker: JobTracker, work: Work, options: PipelineOptions) -> None:
        self._database = database
        self._tracker = tracker
        self._work = work
        self._options = options
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._idle: set[str] = set()
        """Jobs whose workflow was claimed at the last comparison, but without anything that works on it."""
        self._keeper: asyncio.Task[None] | None = None
        self._workflow: Callable[[str], Coroutine[Any, Any, None]] | None = None

    async def launch(self) -> None:
        """Start; jobs that were under way go on, and jobs that a crash left without a workflow get one.

        Raises:
            sqlalchemy.exc.DatabaseError: the database cannot be used.
        """
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            # A handler of any kind keeps the engine from adding its own; records then go to the root's.
            logger.addHandler(logging.NullHandler())
            logger.addFilter(_EngineNoise())
        DBOS(config=self._engine_config())
        self._workflow = DBOS.workflow(name="make_clip", max_recovery_attempts=MAX_RECOVERIES)(self._make_clip())
        # On the event loop's own thread: the engine then runs workflows on this loop and not on one of its own.
        DBOS.launch()
        await DBOS.register_queue_async(
            _QUEUE,
            worker_concurrency=self._options.max_concurrent_jobs,
            polling_interval_sec=_POLL_S,
            on_conflict="always_update",
        )
        await self.reconcile()
        self._keeper = asyncio.create_task(self._keep())

    async def submit(self, job_id: str) -> None:
        """Queue a job that is in the table; doing so again changes nothing."""
        assert self._workflow is not None, "submit before launch"
        with SetWorkflowID(job_id):
            await DBOS.enqueue_workflow_async(_QUEUE, self._workflow, job_id)

    async def cancel(self, job_id: str) -> bool:
        """Stop a job at once; False if it had ended. Returns when its work has stopped."""
        if not await self._tracker.finish(job_id, Ending.cancelled()):
            return False
        await DBOS.cancel_workflow_async(job_id)
        await self._stop([job_id])
        return True

    async def forget(self, job_id: str) -> None:
        """Drop what is known of an ended job; returns when nothing works on it any more."""
        await self._stop([job_id])
        await DBOS.delete_workflow_async(job_id)

    async def close(self) -> None:
        """Stop working; unfinished jobs go on at the next launch."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        await self._stop(list(self._running))
        # The engine joins its threads, and those may wait for this loop.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: DBOS.destroy(destroy_registry=True))

    async def reconcile(self) -> None:
        """Bring table and workflows together where a crash or the engine's own limits left them apart."""
        unfinished = await self._tracker.unfinished_ids()
        self._idle.intersection_update(unfinished)
        for start in range(0, len(unfinished), _LOOKUP_SIZE):
            job_ids = unfinished[start : start + _LOOKUP_SIZE]
            found = await DBOS.list_workflows_async(workflow_ids=job_ids, load_input=False, load_output=False)
            workflows = {workflow.workflow_id: workflow for workflow in found}
            for job_id in job_ids:
                await self._reconcile_one(job_id, workflows.get(job_id))

    async def _reconcile_one(self, job_id: str, workflow: WorkflowStatus | None) -> None:
        status = WorkflowStatusString(workflow.status) if workflow is not None else None
        if workflow is None:
            log.warning("job had no workflow", job_id=job_id)
            await self.submit(job_id)
        elif status in (WorkflowStatusString.ENQUEUED, WorkflowStatusString.PENDING, WorkflowStatusString.DELAYED):
            if workflow.app_version != PIPELINE_VERSION:
                log.warning("job begins again", job_id=job_id, was_version=workflow.app_version)
                await DBOS.delete_workflow_async(job_id)
                await self.submit(job_id)
            elif status is WorkflowStatusString.PENDING and job_id not in self._running:
                await self._rouse(job_id)
            else:
                self._idle.discard(job_id)
        elif status is WorkflowStatusString.CANCELLED:
            await self._tracker.finish(job_id, Ending.cancelled())
        elif status is WorkflowStatusString.MAX_RECOVERY_ATTEMPTS_EXCEEDED:
            what = f"the gateway was stopped {MAX_RECOVERIES + 1} times while it worked on this job"
            await self._tracker.finish(
                job_id, Ending.failed("ABORTED", f"{what}; create the job again if it should run")
            )
        else:
            # The workflow writes the job's end before its own, so this is an end outside the workflow's code.
            await self._tracker.finish(job_id, Ending.failed("INTERNAL", f"the job's workflow ended {workflow.status}"))

    async def _rouse(self, job_id: str) -> None:
        """Queue a claimed workflow again if nothing has begun it since the last comparison: its start or end failed."""
        if job_id in self._idle:
            log.warning("job was claimed but nothing works on it", job_id=job_id)
            self._idle.discard(job_id)
            await DBOS.resume_workflow_async(job_id, queue_name=_QUEUE)
        else:
            self._idle.add(job_id)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_RECONCILE_S)
            try:
                await self.reconcile()
            except (sa.exc.SQLAlchemyError, engine_error.DBOSException, DiskFull) as error:
                log.error("table and workflows could not be compared", reason=str(error))

    async def _stop(self, job_ids: Sequence[str]) -> None:
        tasks = {self._running[job_id] for job_id in job_ids if job_id in self._running}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _make_clip(self) -> Callable[[str], Coroutine[Any, Any, None]]:
        """The workflow's function."""

        async def make_clip(job_id: str) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._running[job_id] = task
            try:
                job = await _until_written(lambda: self._tracker.begin(job_id))
                if job is not None:
                    ending = await self._ending(job)
                    await _until_written(lambda: self._tracker.finish(job_id, ending))
            finally:
                if self._running.get(job_id) is task:
                    del self._running[job_id]

        return make_clip

    async def _ending(self, job: Job) -> Ending:
        """How a job ends: the main loop of the work, where every failure becomes the job's."""
        try:
            with disk_full_is_said():
                return Ending.completed(await self._stages(job))
        except OviError as error:
            log.info("job failed", job_id=job.id, code=error.code, reason=error.message)
            return Ending.failed(error.code, error.message)
        except engine_error.DBOSStepTimeoutError:
            what = f"a stage took longer than {self._options.stage_timeout_s:g} s"
            return Ending.failed("DEADLINE_EXCEEDED", f"{what}; ask for fewer steps or a smaller size")
        except Exception as error:
            error_id = secrets.token_hex(8)
            log.error("unexpected error", job_id=job.id, error_id=error_id, exc_info=error)
            return Ending.failed(
                "INTERNAL", f"internal error {error_id}; the gateway's log has the details under this id"
            )

    async def _stages(self, job: Job) -> VideoInfo:
        lost: ReferenceLost | None = None
        for _ in range(_MAX_REMAKES):
            embeddings: Refs = await self._step("encode_prompt", self._work.encode_prompt, job.id)
            first_frame: dict[str, Any] | None = None
            if job.parameters.image_id:
                first_frame = await self._step("encode_image", self._work.encode_image, job.id)
            try:
                await self._step("denoise", self._work.denoise, job.id, embeddings, first_frame)
                break
            except ReferenceLost as error:
                log.warning("inputs of the denoise were lost", job_id=job.id, reason=error.message)
                lost = error
        else:
            raise ReferenceLost(f"inputs of the denoise were lost {_MAX_REMAKES} times, the last time: {lost}")
        video = await self._step("decode", self._decode, job.id)
        return VideoInfo.from_json(video)

    async def _decode(self, job_id: str) -> dict[str, Any]:
        return (await self._work.decode(job_id)).to_json()

    async def _step(self, name: str, stage: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """A stage as a step: its result or error is remembered, and a cancel stops it."""

        async def run() -> T:
            return await stage(*arguments)

        timeout_s = self._options.stage_timeout_s
        return await DBOS.run_step_async(StepOptions(name=name, preemptible=True, timeout_seconds=timeout_s), run)

    def _engine_config(self) -> DBOSConfig:
        return DBOSConfig(
            name=_APPLICATION,
            system_database_engine=self._database,
            serializer=JsonSerializer(),
            application_version=PIPELINE_VERSION,
            executor_id=_EXECUTOR_ID,
            log_level="WARNING",
            enable_otlp=False,
        )


async def _until_written(write: Callable[[], Awaitable[T]]) -> T:
    """The result of a write to the table, tried until it succeeds: a job must not run on without anybody knowing."""
    while True:
        try:
            return await write()
        except (DiskFull, sa.exc.OperationalError) as error:
            log.error("the jobs table could not be written; trying again", reason=str(error))
            await asyncio.sleep(_RECONCILE_S)
