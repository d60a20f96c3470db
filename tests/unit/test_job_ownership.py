"""A gateway that was held to be gone learns from the table that a job is another's now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from services.gateway.database import open_database
from services.gateway.jobs.domain import ClipParameters, Job, JobStage, Progress, new_job_id
from services.gateway.jobs.schema import jobs
from services.gateway.jobs.store import JobStore
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.migrations import migrate
from shared.errors import DiskFull
from shared.sampling_options import SamplingOptions

PARAMETERS = ClipParameters("a cat", "blur", "echo", "tiny", 64, 96, 121, SamplingOptions(), "")


@pytest.fixture
def engine(tmp_path) -> Iterator[sa.Engine]:
    engine = open_database(tmp_path / "jobs.sqlite3")
    migrate(engine)
    yield engine
    engine.dispose()


def lost_by(engine: sa.Engine, *, shared: bool, full: bool = False, taken: bool = True) -> tuple[bool, list[str]]:
    """Whether a job at its denoise is still this gateway's, and which jobs it says to have lost."""
    store = JobStore(engine, "a")
    lost: list[str] = []

    async def ask() -> bool:
        tracker = JobTracker(store, GatewayMetrics(), shared=shared)
        tracker.on_lost = lost.append
        job = await tracker.create(Job(new_job_id(), PARAMETERS, create_time_s=1.0), "h")
        with engine.begin() as connection:
            connection.execute(sa.update(jobs).values(state="running", owner="a"))
        await tracker.claimed(store.get(job.id))
        await tracker.enter(job.id, JobStage.DENOISE, total=10, done=3)
        if taken:
            with engine.begin() as connection:
                connection.execute(sa.update(jobs).values(owner="b"))
        if full:
            store.save = _refuse
        ours = await tracker.is_ours(job.id)
        assert ours or not await tracker.is_ours(job.id), "once lost, lost for good"
        assert store.get(job.id).progress == Progress(JobStage.DENOISE, 3, 10)
        tracker.close()
        return ours

    return asyncio.run(ask()), lost


def _refuse(*args: object) -> None:
    raise DiskFull("no room")


def test_a_job_that_another_gateway_has_taken_is_lost(engine):
    ours, lost = lost_by(engine, shared=True)
    assert not ours and len(lost) == 1


def test_a_job_that_nobody_has_taken_is_still_ours(engine):
    assert lost_by(engine, shared=True, taken=False) == (True, [])


def test_where_nobody_else_can_take_it_the_table_is_not_asked(engine):
    assert lost_by(engine, shared=False) == (True, [])


def test_a_full_disk_takes_nothing_away(engine):
    assert lost_by(engine, shared=True, full=True, taken=False) == (True, [])
