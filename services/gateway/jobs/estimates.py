"""Positions and times of jobs that wait or run, from a snapshot of the queue that is at most some seconds old."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from services.gateway.jobs import admission
from services.gateway.jobs.admission import QueueSnapshot
from services.gateway.jobs.costs import CostModel, Load, estimate
from services.gateway.jobs.domain import Job, JobState
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.tracker import JobTracker

_FRESH_S = 1.0
_LARGEST_SHARE = 0.05
"""Of the time that is spent on reading the queue: a long one is read less often."""
_LATE_S = 2.0
"""For so long after that the last reading is given while the next one is made, so that hardly anybody waits for one."""
_LEARNED_FROM = 500
"""Last completed jobs that are read at once."""


@dataclass(frozen=True)
class QueueStats:
    """The queue as a whole."""

    queued: int
    running: int
    wait_s: float | None
    """Until a job that is created now is begun; None: nothing is known yet of how long jobs take."""


@dataclass(frozen=True)
class _Look:
    snapshot: QueueSnapshot
    load: Load
    running: int
    good_until_s: float
    """By the monotonic clock."""


class Estimator:
    """Estimates of one gateway; all gateways on a database come to about the same."""

    def __init__(self, queue: JobQueue, tracker: JobTracker, lanes: Callable[[], int]) -> None:
        """
        Args:
            queue: is looked at.
            tracker: runs what asks the database.
            lanes: tells how many jobs the slowest stage works on at once; one at least is reckoned with.
        """
        self._queue = queue
        self._tracker = tracker
        self._lanes = lanes
        self._model = CostModel()
        self._learned_until_s = 0.0
        self._last: _Look | None = None
        self._reading: asyncio.Task[_Look] | None = None

    async def fill(self, jobs: Iterable[Job]) -> list[Job]:
        """The same jobs, with an estimate in those that wait or run."""
        listed = list(jobs)
        if not any(job.state in (JobState.QUEUED, JobState.RUNNING) for job in listed):
            return listed
        look = await self._look()
        return [self._filled(job, look) for job in listed]

    async def stats(self) -> QueueStats:
        """The queue now, or some seconds ago."""
        look = await self._look()
        load, queued = look.load, look.snapshot.total
        busy_s = load.under_way_s + queued * load.each_s if load.each_s is not None else None
        if not queued:
            busy_s = 0.0
        return QueueStats(queued, look.running, busy_s / load.lanes if busy_s is not None else None)

    def _filled(self, job: Job, look: _Look) -> Job:
        if job.state not in (JobState.QUEUED, JobState.RUNNING):
            return job
        asked = job.submission
        position = 0
        if job.state is JobState.QUEUED:
            rank = admission.rank(job.create_time_s, asked.priority)
            position = look.snapshot.position(asked.key_id, rank, asked.priority)
        return replace(job, estimate=estimate(job, position, look.load, self._model, time.time()))

    async def _look(self) -> _Look:
        last = self._last
        late_s = math.inf if last is None else time.monotonic() - last.good_until_s
        if last is not None and late_s <= 0:
            return last
        if self._reading is None:
            self._reading = asyncio.create_task(self._renew())
            # A failure is told to who waits: whoever asks next, if nobody does now.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        if last is not None and late_s <= _LATE_S:
            return last
        return await asyncio.shield(self._reading)

    async def _renew(self) -> _Look:
        try:
            self._last = await self._tracker.in_thread(self._read)
            return self._last
        finally:
            self._reading = None

    def _read(self) -> _Look:
        begun_s = time.monotonic()
        for cost_class, stage_seconds, end_time_s in self._queue.completed_since(self._learned_until_s, _LEARNED_FROM):
            self._model.learn(cost_class, stage_seconds)
            self._learned_until_s = end_time_s
        snapshot = self._queue.snapshot()
        running = self._queue.running()
        load = Load.of(running, snapshot.num_by_class, max(1, self._lanes()), self._model)
        ended_s = time.monotonic()
        good_s = max(_FRESH_S, (ended_s - begun_s) / _LARGEST_SHARE)
        return _Look(snapshot, load, len(running), ended_s + good_s)
