"""Keeps this gateway's part of the queue in order: its lease, jobs of gateways that are gone, deadlines, strays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from services.gateway.config import Retention
from services.gateway.disk import DatabaseAway
from services.gateway.jobs.leases import Lease
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.signals import Signal
from services.gateway.jobs.tracker import JobTracker
from services.gateway.objects import ArtifactsAway
from services.gateway.pipeline.pipeline import Pipeline
from services.gateway.pipeline.workflows import Workflows
from shared.errors import DiskFull
from shared.logging import get_logger
from shared.unending import unending

log = get_logger(__name__)

_LOOK_S = 1.0
_GUARD_S = 0.2
_BEGIN_S = 30.0
"""After this time the engine is not expected any more to begin a workflow that it was given."""
_TIDY_S = 10.0
_OUTLIVED_AT_ONCE = 200


class Keeper:
    """Runs beside the pipeline. Without a lease this gateway is the only one, as the lock of its data folder says."""

    def __init__(
        self,
        queue: JobQueue,
        tracker: JobTracker,
        pipeline: Pipeline,
        workflows: Workflows,
        lease: Lease | None,
        retention: Retention,
    ) -> None:
        self._queue = queue
        self._tracker = tracker
        self._pipeline = pipeline
        self._workflows = workflows
        self._lease = lease
        self._retention = retention
        self._tasks: list[asyncio.Task[None]] = []
        self._unattended: set[str] = set()
        """Jobs that were this gateway's at the last look, but without anything that works on them."""

    async def start(self) -> None:
        """Take the lease, free the jobs of gateways that are gone, and go on doing so.

        Raises:
            DatabaseAway: the database cannot be reached.
        """
        lease = self._lease
        if lease is not None:
            await self._tracker.in_thread(lease.renew)
            self._going_on("the lease is renewed", partial(self._renew, lease))
            self._going_on("the lease is watched", partial(self._guard, lease))
        await self._take_from_lost()
        self._going_on("the queue is looked after", partial(self._every, _LOOK_S, self._look))
        self._going_on("old jobs are removed", partial(self._every, _TIDY_S, self._tidy))

    async def hear(self, signal: Signal) -> None:
        """Another replica says that something has changed."""
        if signal.queue:
            self._pipeline.wake()
        if signal.job_id in self._pipeline.claimed:
            await self._drop_strays()
        await self._tracker.hear(signal)

    async def stop(self) -> None:
        """End; the lease goes last, when the pipeline has let go of its jobs."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def end_lease(self) -> None:
        """Say that this gateway is gone."""
        if self._lease is not None:
            try:
                await self._tracker.in_thread(self._lease.end)
            except DatabaseAway as error:
                log.warning("the lease was left to end by itself", reason=error.message)

    def _going_on(self, what: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(asyncio.create_task(unending(what, loop)))

    async def _every(self, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except (DatabaseAway, DiskFull, ArtifactsAway) as error:
                log.error("the queue could not be looked after", reason=error.message)

    async def _renew(self, lease: Lease) -> None:
        while True:
            try:
                await self._tracker.in_thread(lease.renew)
                pause_s = lease.renew_s
            except (DatabaseAway, DiskFull) as error:
                log.error("the lease was not renewed", reason=error.message)
                pause_s = min(_LOOK_S, lease.renew_s)
            await asyncio.sleep(pause_s)

    async def _guard(self, lease: Lease) -> None:
        """Stop all work as soon as others may have been given it; asks nobody, so nothing can hold it up."""
        while True:
            await asyncio.sleep(_GUARD_S)
            if not lease.valid and self._pipeline.claimed:
                log.error("the lease has ended; all work stops", jobs=sorted(self._pipeline.claimed))
                await self._pipeline.stop(self._pipeline.claimed)

    async def _look(self) -> None:
        await self._drop_strays()
        await self._free_unattended()
        await self._take_from_lost()
        if await self._tracker.in_thread(self._queue.expire, time.time()):
            self._pipeline.wake()
        await self._tracker.keep_progress()
        await self._tracker.reread(self._tracker.watched_elsewhere)

    async def _drop_strays(self) -> None:
        strays = await self._tracker.in_thread(self._queue.strays, self._pipeline.claimed)
        # A job whose end was written here meanwhile is no stray.
        if strays := strays & self._pipeline.claimed:
            await self._pipeline.drop(strays)

    async def _free_unattended(self) -> None:
        """Let go of this gateway's jobs that nothing works on: their start failed, or they were stopped."""
        if late := self._pipeline.never_begun(_BEGIN_S):
            log.error("the workflow engine does not begin these jobs; they are let go of", jobs=late)
            await self._pipeline.stop(late)
        owned = {job.id for job in await self._tracker.in_thread(self._queue.owned)}
        unattended = owned - self._pipeline.claimed
        if twice := unattended & self._unattended:
            log.warning("jobs were taken but nothing works on them", jobs=sorted(twice))
            await self._tracker.in_thread(self._queue.release, sorted(twice))
            self._pipeline.wake()
        self._unattended = unattended

    async def _take_from_lost(self) -> None:
        freed, failed = await self._tracker.in_thread(self._queue.take_from_lost, time.time())
        for job in failed:
            log.error("job was given up", job_id=job.id, reason=job.failure.message if job.failure else "")
            await self._tracker.changed(job)
        if freed:
            self._pipeline.wake()

    async def _tidy(self) -> None:
        if self._lease is not None:
            await self._workflows.forget_executors(await self._tracker.in_thread(self._lease.known))
        while self._retention.limited:
            read = self._queue.outlived
            ids = await self._tracker.in_thread(read, self._retention, time.time(), _OUTLIVED_AT_ONCE)
            for job_id in ids:
                await self._pipeline.remove(job_id)
            if len(ids) < _OUTLIVED_AT_ONCE:
                break
