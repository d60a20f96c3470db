"""Sets a long job aside for one of higher priority, where that was asked for."""

from __future__ import annotations

import asyncio
import time

from services.gateway.disk import DatabaseAway
from services.gateway.jobs.giving_way import who_gives_way
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.tracker import JobTracker
from services.gateway.pipeline.pipeline import Pipeline, Work
from shared.errors import DiskFull
from shared.logging import get_logger
from shared.unending import unending

log = get_logger(__name__)

_LOOK_S = 1.0


class GivingWay:
    """Looks once a second whether somebody waits who goes before somebody that is denoised."""

    def __init__(self, queue: JobQueue, tracker: JobTracker, pipeline: Pipeline, work: Work) -> None:
        self._queue = queue
        self._tracker = tracker
        self._pipeline = pipeline
        self._work = work
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._looking = asyncio.create_task(unending("jobs give way", self._look))

    async def stop(self) -> None:
        """End; a job that is being set aside is paused or queued afterwards."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._once()
            except (DatabaseAway, DiskFull) as error:
                log.error("nobody could give way", reason=error.message)

    async def _once(self) -> None:
        denoises = await self._work.denoises()
        if not denoises:
            return
        head = await self._tracker.in_thread(self._queue.head, time.time()) if self._pipeline.is_full else None
        job_id = who_gives_way(denoises, head, self._work.num_workers)
        if job_id is not None and job_id in self._pipeline.claimed:
            log.info("a job gives way", job_id=job_id)
            await self._give_way(job_id)

    async def _give_way(self, job_id: str) -> None:
        """Paused for as long as its stop takes, then back in the queue, where it has the place it had."""
        if await self._tracker.in_thread(self._queue.pause, job_id) is None:
            return
        try:
            await self._pipeline.set_aside(job_id)
        finally:
            job = await self._tracker.until_written(lambda: self._tracker.in_thread(self._queue.resume, job_id))
            if job is not None:
                await self._tracker.changed(job)
            self._pipeline.wake()
