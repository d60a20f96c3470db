"""Takes jobs from the queue, a few at a time, and carries each to its end; one step of its workflow a stage."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from services.gateway.config import PipelineOptions
from services.gateway.disk import DatabaseAway, database_away_is_said, disk_full_is_said
from services.gateway.jobs.domain import Ending, Job, JobState, VideoInfo
from services.gateway.jobs.giving_way import Denoise
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.tracker import JobTracker
from services.gateway.objects import ArtifactsAway
from services.gateway.pipeline.workflows import CANCELLED, Workflows
from services.gateway.workers.choosing import job_slots
from shared.errors import DiskFull, NotFound, OviError, ReferenceLost
from shared.logging import get_logger
from shared.unending import unending

T = TypeVar("T")

log = get_logger(__name__)

_MAX_REMAKES = 5
"""How often lost inputs of a denoise are made again before the job fails."""
_LOOK_S = 1.0
"""Between two looks at the queue without having been told that there is something."""

Refs = list[dict[str, Any]]


class Work(Protocol):
    """The stages; see `services.gateway.work`."""

    async def encode_prompt(self, job_id: str) -> Refs: ...

    async def encode_image(self, job_id: str) -> dict[str, Any]: ...

    async def denoise(
        self, job_id: str, embeddings: Sequence[dict[str, Any]], first_frame: dict[str, Any] | None
    ) -> None: ...

    async def decode(self, job_id: str) -> VideoInfo: ...

    async def set_aside(self, job_id: str) -> None: ...

    @property
    def num_workers(self) -> int: ...

    async def denoises(self) -> Sequence[Denoise]: ...


class Files(Protocol):
    """What jobs leave in the artifact store; see `services.gateway.artifacts`."""

    def delete(self, job_id: str) -> None: ...

    def delete_checkpoint(self, job_id: str) -> None: ...

    def tidy(self, job_id: str) -> int: ...


class Pipeline:
    """The jobs that this gateway works on. One a process."""

    def __init__(
        self,
        workflows: Workflows,
        queue: JobQueue,
        tracker: JobTracker,
        work: Work,
        files: Files,
        options: PipelineOptions,
        may_work: Callable[[], bool],
        num_gateways: Callable[[], int],
    ) -> None:
        """
        Args:
            workflows: the workflow engine.
            queue: where jobs come from.
            tracker: is told what becomes of them.
            work: the stages.
            files: of jobs.
            options: how many at once, and how long.
            may_work: false while other gateways may hold this one to be gone.
            num_gateways: that take jobs from the queue, this one among them.
        """
        self._workflows = workflows
        self._queue = queue
        self._tracker = tracker
        self._work = work
        self._files = files
        self._options = options
        self._may_work = may_work
        self._num_gateways = num_gateways
        self._claimed: dict[str, float] = {}
        """Jobs that were taken and have not been let go of, and when they were taken, by the monotonic clock."""
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._wake = asyncio.Event()
        self._admitter: asyncio.Task[None] | None = None
        self._drops: set[asyncio.Task[None]] = set()
        self._aside: dict[str, asyncio.Task[None]] = {}
        """Paused jobs that are being let go of."""
        tracker.on_lost = self._on_lost

    async def launch(self) -> None:
        """Start to take jobs.

        Raises:
            sqlalchemy.exc.DatabaseError: the database cannot be used.
        """
        await self._workflows.launch(self._make_clip)
        self._admitter = asyncio.create_task(unending("jobs are taken", self._admit))

    def wake(self) -> None:
        """There may be something in the queue."""
        self._wake.set()

    @property
    def is_full(self) -> bool:
        """Whether no further job is taken for now."""
        slots = job_slots(self._options.max_concurrent_jobs, self._work.num_workers, self._num_gateways())
        return len(self._claimed) >= slots

    @property
    def claimed(self) -> frozenset[str]:
        """Ids of the jobs that this gateway works on."""
        return frozenset(self._claimed)

    def never_begun(self, after_s: float) -> list[str]:
        """Ids of jobs that were taken so long ago and whose workflow the engine has not begun."""
        latest_s = time.monotonic() - after_s
        return [id_ for id_, taken_s in self._claimed.items() if id_ not in self._running and taken_s < latest_s]

    async def cancel(self, job_id: str) -> bool:
        """Stop a job at once, whichever gateway works on it; False if it had ended.

        Returns when its work has stopped, if that was here; another gateway stops as soon as it hears of it.
        """
        if not await self._tracker.finish(job_id, Ending.cancelled()):
            return False
        await self._workflows.cancel(job_id)
        await self.stop([job_id])
        return True

    async def stop(self, job_ids: Collection[str]) -> None:
        """Stop working on jobs; returns when nothing here works on them any more."""
        tasks = {self._running[job_id] for job_id in job_ids if job_id in self._running}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for job_id in job_ids:
            self._claimed.pop(job_id, None)
            self._tracker.abandon(job_id)
        self.wake()

    async def forget(self, job_id: str) -> None:
        """Drop what is known of an ended job; returns when nothing here works on it any more."""
        await self.stop([job_id])
        await self._workflows.forget(job_id)

    async def set_aside(self, job_id: str) -> None:
        """Stop working on a paused job when its denoise, if it is at one, has kept where it is.

        Returns when nothing here works on it any more.
        """
        if job_id not in self._aside:
            self._aside[job_id] = asyncio.create_task(self._set_aside(job_id))
        await asyncio.shield(self._aside[job_id])

    async def _set_aside(self, job_id: str) -> None:
        try:
            await self._work.set_aside(job_id)
        finally:
            await self.stop([job_id])
            del self._aside[job_id]

    async def remove(self, job_id: str) -> None:
        """Delete an ended job and its files. The row goes last: what a crash leaves behind can be deleted again."""
        await self.forget(job_id)
        await asyncio.to_thread(self._files.delete, job_id)
        await self._tracker.delete(job_id)

    async def drop(self, job_ids: Collection[str]) -> None:
        """Stop working on jobs that have ended or are another gateway's, and let go of paused ones as they can be left.

        Files of cancelled ones go. Returns when nothing here works on those that are not paused.
        """
        states: dict[str, JobState | None] = {}
        for job_id in job_ids:
            self._tracker.abandon(job_id)
            try:
                states[job_id] = (await self._tracker.get(job_id)).state
            except NotFound:
                states[job_id] = None
            except DatabaseAway:
                await self.stop(job_ids)
                raise
        paused = {job_id for job_id, state in states.items() if state is JobState.PAUSED}
        for job_id in paused:
            self._beside(self.set_aside(job_id))
        await self.stop(states.keys() - paused)
        for job_id, state in states.items():
            if state is JobState.CANCELLED or state is None:
                await self.discard_files(job_id)

    async def discard_files(self, job_id: str) -> None:
        """Delete the files of a job that was cancelled. Where the artifact store is away they go with the job's row."""
        try:
            await asyncio.to_thread(self._files.delete, job_id)
        except ArtifactsAway as error:
            log.warning("files of a cancelled job were left", job_id=job_id, reason=error.message)

    async def close(self) -> None:
        """Stop working; unfinished jobs go on in another gateway, or here at the next start."""
        if self._admitter is not None:
            self._admitter.cancel()
            await asyncio.wait({self._admitter})
            await self.stop(self.claimed)
            with contextlib.suppress(DatabaseAway, DiskFull):
                await self._tracker.in_thread(self._queue.release)
        await self._workflows.close()

    async def _admit(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self._may_work() and not self.is_full:
                    if not await self._take():
                        break
            except (DatabaseAway, DiskFull) as error:
                log.error("no job could be taken", reason=error.message)
                await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOK_S)

    async def _take(self) -> bool:
        """Take the next job and begin to work on it; False if there is none."""
        job = await self._tracker.in_thread(self._queue.claim, time.time())
        if job is None:
            return False
        if job.id in self._aside:  # paused and resumed since: nothing of before may still be at work
            await asyncio.wait({self._aside[job.id]})
        self._claimed[job.id] = time.monotonic()
        await self._tracker.claimed(job)
        try:
            ended = await self._workflows.start(job.id)
        except DatabaseAway:
            await self.stop([job.id])
            raise
        if ended is not None:
            ending = Ending.failed("INTERNAL", f"the job's workflow ended {ended.value}")
            if ended is CANCELLED:
                ending = Ending.cancelled()
            await self._tracker.until_written(lambda: self._tracker.finish(job.id, ending))
            await self.stop([job.id])
        return True

    def _on_lost(self, job_id: str) -> None:
        """What was written last of a job was refused: it is not this gateway's any more."""
        self._beside(self.drop([job_id]))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _make_clip(self, job_id: str) -> None:
        """The workflow."""
        task = asyncio.current_task()
        assert task is not None
        if job_id not in self._claimed:
            log.error("a workflow was begun that nobody asked for", job_id=job_id)
            raise asyncio.CancelledError
        self._running[job_id] = task
        try:
            job = await self._tracker.get(job_id)
            ending = await self._ending(job)
            num_bytes = await asyncio.to_thread(self._tidied, job_id, ending)
            await self._tracker.until_written(lambda: self._tracker.finish(job_id, ending, num_bytes))
        finally:
            if self._running.get(job_id) is task:
                del self._running[job_id]
                self._claimed.pop(job_id, None)
                self.wake()

    def _tidied(self, job_id: str, ending: Ending) -> int:
        """Remove what an ended job needs no more; bytes of what it keeps."""
        try:
            self._files.delete_checkpoint(job_id)  # that of a job that failed is of no use
            return self._files.tidy(job_id)
        except ArtifactsAway as error:
            log.warning("files of an ended job were not looked through", job_id=job_id, reason=error.message)
            return ending.video.num_bytes if ending.video is not None else 0

    async def _ending(self, job: Job) -> Ending:
        """How a job ends: the main loop of the work, where every failure becomes the job's."""
        try:
            with database_away_is_said(), disk_full_is_said():
                return Ending.completed(await self._stages(job))
        except DatabaseAway as error:
            # A cancelled workflow is one that is not finished; the job is taken again when the database is back.
            log.warning("job is interrupted", job_id=job.id, reason=error.message)
            raise asyncio.CancelledError from None
        except OviError as error:
            log.info("job failed", job_id=job.id, code=error.code, reason=error.message)
            return Ending.failed(error.code, error.message)
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
        """A stage as a step of the workflow."""

        async def run() -> T:
            return await stage(*arguments)

        return await self._workflows.step(name, run, self._options.stage_timeout_s)
