"""Who asks for positions does not wait for the queue to be read, unless what was read last is too old."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from services.gateway.database import open_database
from services.gateway.jobs import estimates
from services.gateway.jobs.admission import NoLimits, QueueSnapshot
from services.gateway.jobs.domain import ClipParameters, Job, new_job_id
from services.gateway.jobs.estimates import Estimator
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.store import JobStore
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.migrations import migrate
from shared.sampling_options import SamplingOptions

PARAMETERS = ClipParameters("a cat", "blur", "echo", "tiny", 64, 96, 121, SamplingOptions())
WAIT_S = 30.0


class HeldQueue(JobQueue):
    """Is read only while that is allowed."""

    allowed = threading.Event()

    def snapshot(self) -> QueueSnapshot:
        assert self.allowed.wait(WAIT_S)
        return super().snapshot()


def test_the_last_reading_is_given_while_the_next_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_FRESH_S", 0.0)
    monkeypatch.setattr(estimates, "_LARGEST_SHARE", 1e9)
    monkeypatch.setattr(estimates, "_LATE_S", WAIT_S)
    database = open_database(tmp_path / "jobs.sqlite3")
    migrate(database)
    store, queue = JobStore(database), HeldQueue(database, "me", NoLimits(), shared=False)
    tracker = JobTracker(store, GatewayMetrics())

    def create() -> None:
        store.create(Job(new_job_id(), PARAMETERS, create_time_s=1.0), "h")

    async def ask() -> None:
        estimator = Estimator(queue, tracker, lanes=lambda: 1)
        queue.allowed.set()
        create()
        assert (await estimator.stats()).queued == 1
        queue.allowed.clear()
        create()
        async with asyncio.timeout(WAIT_S / 3):
            assert [(await estimator.stats()).queued for _ in range(3)] == [1, 1, 1]
            queue.allowed.set()
            while (await estimator.stats()).queued < 2:
                await asyncio.sleep(0)
        monkeypatch.setattr(estimates, "_LATE_S", 0.0)
        create()
        counts = [stats.queued for stats in await asyncio.gather(*(estimator.stats() for _ in range(4)))]
        assert len(set(counts)) == 1, "they wait for one reading"
        assert (await estimator.stats()).queued == 3

    asyncio.run(ask())
    tracker.close()
    database.dispose()
