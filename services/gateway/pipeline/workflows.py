"""The workflow engine: the one place that calls it. Workflow id = job id; it knows only jobs that were begun.

A job's first attempt starts its workflow here. A later one, by whichever gateway has taken the job, resumes it on a
queue of that gateway's own, from which nobody else takes; the engine then repeats the workflow and skips the steps that
were finished. Whether a job may be worked on is not the engine's business: the jobs table says so.
Source of the engine's traps that are stepped around here: DBOS Transact 3.4.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, SetWorkflowID, StepOptions, WorkflowStatusString
from dbos import error as engine_error

from services.gateway.disk import DatabaseAway, database_away_is_said
from services.gateway.pipeline.serializer import JsonSerializer
from shared.errors import DeadlineExceeded, Internal
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)

PIPELINE_VERSION = "2"
"""Changes with the sequence of steps; unfinished jobs of another version begin again (kept latents are used again)."""
_APPLICATION = "ovi-gateway"
_QUEUE_PREFIX = "gateway-"
_OLD_QUEUES = ("jobs",)
"""Of version 1, in which the engine held the queue."""
_POLL_S = 0.5
CANCELLED = WorkflowStatusString.CANCELLED
_UNDER_WAY = (WorkflowStatusString.ENQUEUED, WorkflowStatusString.PENDING, WorkflowStatusString.DELAYED)


class _EngineNoise(logging.Filter):
    """Drops the engine's tracebacks about cancelled tasks: cancelling is how jobs are stopped here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Asyncio task cancelled", "Workflow job_"))


class Workflows:
    """The workflows of one gateway. One a process."""

    def __init__(self, database: sa.Engine, executor_id: str) -> None:
        """
        Args:
            database: where the engine keeps its tables, beside ours.
            executor_id: of this process; no two that live may have the same.
        """
        self._database = database
        self._executor_id = executor_id
        self._queue = _QUEUE_PREFIX + executor_id
        self._workflow: Callable[[str], Coroutine[Any, Any, None]] | None = None
        self._launched = False

    async def launch(self, make_clip: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Start the engine.

        Args:
            make_clip: works on the job of an id to its end.

        Raises:
            sqlalchemy.exc.DatabaseError: the database cannot be used.
        """
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            # A handler of any kind keeps the engine from adding its own; records then go to the root's.
            logger.addHandler(logging.NullHandler())
            logger.addFilter(_EngineNoise())
        DBOS(config=self._config())

        async def workflow(job_id: str) -> None:
            await make_clip(job_id)

        self._workflow = DBOS.workflow(name="make_clip")(workflow)
        DBOS.listen_queues([self._queue])
        # On the event loop's own thread: the engine then runs workflows on this loop and not on one of its own.
        self._launched = True
        DBOS.launch()
        await self._register_queue()

    async def start(self, job_id: str) -> WorkflowStatusString | None:
        """Begin to work on a job, or go on after its last finished step.

        Returns:
            None; or, if the engine holds the job to have ended, how: no job does before the table says so.

        Raises:
            DatabaseAway: the database cannot be reached.
        """
        assert self._workflow is not None, "start before launch"
        with database_away_is_said():
            found = await DBOS.list_workflows_async(workflow_ids=[job_id], load_input=False, load_output=False)
            status = WorkflowStatusString(found[0].status) if found else None
            if found and status in _UNDER_WAY and found[0].app_version != PIPELINE_VERSION:
                log.warning("job begins again", job_id=job_id, was_version=found[0].app_version)
                await DBOS.delete_workflow_async(job_id)
                status = None
            if status is None:
                with SetWorkflowID(job_id):
                    await DBOS.start_workflow_async(self._workflow, job_id)
                return None
            if status in _UNDER_WAY:
                # It may have been dropped while this gateway was held to be gone.
                await self._register_queue()
                await DBOS.resume_workflow_async(job_id, queue_name=self._queue)
                return None
            return status

    async def cancel(self, job_id: str) -> None:
        """The job was cancelled: nothing of it is begun any more."""
        await self._tell(DBOS.cancel_workflow_async, job_id)

    async def forget(self, job_id: str) -> None:
        """Drop what is known of an ended job."""
        await self._tell(DBOS.delete_workflow_async, job_id)

    async def forget_executors(self, known: Collection[str]) -> None:
        """Drop the queues of gateways that are gone for good.

        Args:
            known: executor ids of those that live, or may come back.
        """
        kept = {_QUEUE_PREFIX + executor_id for executor_id in known} | {self._queue}
        with database_away_is_said():
            for queue in await DBOS.list_queues_async():
                if queue.name in _OLD_QUEUES or (queue.name.startswith(_QUEUE_PREFIX) and queue.name not in kept):
                    await DBOS.delete_queue_async(queue.name)

    async def step(self, name: str, stage: Callable[[], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        """A stage as a step: its result or error is remembered, and a cancel stops it.

        Raises:
            DeadlineExceeded: it took longer than `timeout_s`.
        """
        options = StepOptions(name=name, preemptible=True, timeout_seconds=timeout_s)
        try:
            return await DBOS.run_step_async(options, stage)
        except engine_error.DBOSStepTimeoutError:
            what = f"a stage took longer than {timeout_s:g} s"
            raise DeadlineExceeded(f"{what}; ask for fewer steps or a smaller size") from None

    async def close(self) -> None:
        """Stop the engine, if it was started; workflows under way can be taken up by others."""
        if not self._launched:
            return
        try:
            with database_away_is_said():
                await DBOS.delete_queue_async(self._queue)
        except DatabaseAway as error:
            log.warning("the engine's queue was left behind", reason=error.message)
        # The engine joins its threads, and those may wait for this loop.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: DBOS.destroy(destroy_registry=True))

    async def _register_queue(self) -> None:
        await DBOS.register_queue_async(self._queue, polling_interval_sec=_POLL_S, on_conflict="always_update")

    async def _tell(self, call: Callable[[str], Awaitable[None]], job_id: str) -> None:
        try:
            with database_away_is_said():
                await call(job_id)
        except engine_error.DBOSNonExistentWorkflowError:
            log.debug("job had no workflow", job_id=job_id)
        except engine_error.DBOSException as error:
            raise Internal(f"the workflow engine failed: {error}") from error

    def _config(self) -> DBOSConfig:
        return DBOSConfig(
            name=_APPLICATION,
            system_database_engine=self._database,
            serializer=JsonSerializer(),
            application_version=PIPELINE_VERSION,
            executor_id=self._executor_id,
            log_level="WARNING",
            enable_otlp=False,
        )
