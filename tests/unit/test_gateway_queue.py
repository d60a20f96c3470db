"""The queue in the jobs table, on SQLite and on PostgreSQL: who is next, whose a job is, what becomes of lost ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from services.gateway.auth.caller import NO_LIMITS, KeyLimits
from services.gateway.config import Retention
from services.gateway.database import database_url, open_database, open_postgres
from services.gateway.jobs.domain import (
    ClipParameters,
    Ending,
    Job,
    JobState,
    Progress,
    Submission,
    VideoInfo,
    new_job_id,
)
from services.gateway.jobs.leases import Lease
from services.gateway.jobs.listing import JobFilter
from services.gateway.jobs.queue import MAX_OWNERS_LOST, JobQueue
from services.gateway.jobs.schema import leases
from services.gateway.jobs.store import JobStore
from services.gateway.migrations import migrate
from shared.errors import AlreadyExists, QuotaExceeded
from shared.sampling_options import SamplingOptions
from tests.postgres import PostgresUnderTest, running_postgres

PARAMETERS = ClipParameters("a cat", "blur", "echo", "tiny", 64, 96, 121, SamplingOptions(seed=5))
VIDEO = VideoInfo(num_bytes=1234, height=64, width=96, num_frames=121, fps=24)
NOW_S = 1_000_000.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresUnderTest]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path) -> Iterator[sa.Engine]:
    if request.param == "sqlite":
        engine = open_database(tmp_path / "jobs.sqlite3")
    else:
        engine = open_postgres(database_url(request.getfixturevalue("postgres").new_database()))
    migrate(engine)
    yield engine
    engine.dispose()


class Book:
    """Limits as a test puts them."""

    def __init__(self, **limits: KeyLimits) -> None:
        self.limits = limits

    def of(self, key_id: str) -> KeyLimits:
        return self.limits.get(key_id, NO_LIMITS)


class Gateway:
    """A gateway's view of the tables."""

    def __init__(self, database: sa.Engine, name: str, **limits: KeyLimits) -> None:
        book = Book(**limits)
        self.store = JobStore(database, name, book)
        self.queue = JobQueue(database, name, book, shared=True)
        self.lease = Lease(database, name, lease_s=20.0)
        self.lease.renew()

    def make(self, create_time_s: float = NOW_S, **asked: Any) -> str:
        job = Job(new_job_id(), PARAMETERS, create_time_s=create_time_s, submission=Submission(**asked))
        return self.store.create(job, "h").id

    def claim(self, now_s: float = NOW_S) -> str | None:
        job = self.queue.claim(now_s)
        return job.id if job is not None else None


def lose(database: sa.Engine, name: str) -> None:
    """The lease of a gateway ends."""
    with database.begin() as connection:
        connection.execute(sa.update(leases).where(leases.c.executor_id == name).values(until_s=0.0))


def test_the_first_come_are_the_first_begun_and_priorities_overtake(database):
    gateway = Gateway(database, "a")
    slow, first, second = gateway.make(priority=0), gateway.make(), gateway.make(NOW_S + 1)
    urgent, aged = gateway.make(NOW_S + 2, priority=9), gateway.make(NOW_S - 3001, priority=0)
    assert [gateway.claim() for _ in range(6)] == [urgent, aged, first, second, slow, None]
    job = gateway.store.get(first)
    assert job.state is JobState.RUNNING and job.owner == "a" and job.attempts == 1 and job.start_time_s == NOW_S


def test_keys_take_turns_and_the_less_served_go_first(database):
    gateway = Gateway(database, "a")
    many = [gateway.make(NOW_S + index, key_id="many") for index in range(4)]
    few = [gateway.make(NOW_S + 100 + index, key_id="few") for index in range(2)]
    claimed = [gateway.claim(NOW_S + 200 + index) for index in range(6)]
    assert claimed == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_a_higher_priority_of_another_key_goes_first_but_nobody_starves(database):
    gateway = Gateway(database, "a")
    high = [gateway.make(NOW_S + index, key_id="high", priority=7) for index in range(30)]
    low = gateway.make(NOW_S, key_id="low", priority=5)
    claimed = [gateway.claim(NOW_S + 100.0 * (index + 1)) for index in range(20)]
    assert claimed[:5] == high[:5], "two levels above"
    assert low in claimed, "waiting raised it above those who are served"


def test_a_key_has_so_many_jobs_at_once_and_no_more(database):
    limits = {"small": KeyLimits(max_concurrent_jobs=1)}
    first, second = Gateway(database, "a", **limits), Gateway(database, "b", **limits)
    jobs = [first.make(NOW_S + index, key_id="small") for index in range(2)]
    other = first.make(NOW_S + 9, key_id="other")
    assert [first.claim(), second.claim(), second.claim()] == [jobs[0], other, None]
    first.store.finish(jobs[0], Ending.cancelled(), NOW_S)
    assert second.claim() == jobs[1]


def test_a_daily_limit_refuses_and_ends_with_the_day(database):
    gateway = Gateway(database, "a", key=KeyLimits(max_daily_jobs=2))
    ids = [gateway.make(key_id="key"), gateway.make(key_id="key")]
    gateway.store.finish(ids[0], Ending.cancelled(), NOW_S)
    gateway.store.delete(ids[0])
    with pytest.raises(QuotaExceeded, match="2 a day") as refused:
        gateway.make(key_id="key")
    assert refused.value.subject == "key:key" and refused.value.retry_after_s == 86_400 - NOW_S % 86_400
    assert len(gateway.store.page(page_size=9).jobs) == 1, "nothing was kept of the refused one"
    gateway.make(NOW_S + 86_400, key_id="key")
    gateway.make(key_id="other")


def test_concurrent_gateways_never_take_the_same_job(database):
    gateways = [Gateway(database, name) for name in "abc"]
    ids = {gateways[0].make(NOW_S + index) for index in range(60)}

    def drain(gateway: Gateway) -> list[str]:
        taken = []
        while (job_id := gateway.claim()) is not None:
            taken.append(job_id)
        return taken

    with ThreadPoolExecutor(6) as threads:
        taken = [job_id for part in threads.map(drain, gateways * 2) for job_id in part]
    assert len(taken) == 60 and set(taken) == ids


def test_a_paused_job_waits_and_comes_back_to_its_place(database):
    gateway = Gateway(database, "a")
    first, second = gateway.make(), gateway.make(NOW_S + 1)
    assert gateway.queue.pause(first).state is JobState.PAUSED
    assert gateway.claim() == second
    running = gateway.queue.pause(second)
    assert running.state is JobState.PAUSED and running.owner == ""
    assert gateway.store.save(second, Progress(), {}) is None, "it is nobody's now"
    assert gateway.claim() is None
    assert gateway.queue.resume(second).state is JobState.QUEUED and gateway.queue.resume(first) is not None
    assert [gateway.claim(), gateway.claim()] == [first, second]
    assert gateway.queue.resume(first) is None
    gateway.store.finish(first, Ending.cancelled(), NOW_S)
    assert gateway.queue.pause(first) is None


def test_a_job_past_its_deadline_fails_and_never_runs(database):
    gateway = Gateway(database, "a")
    late = gateway.make(deadline_time_s=NOW_S + 5)
    paused = gateway.make(deadline_time_s=NOW_S + 5)
    gateway.queue.pause(paused)
    begun = gateway.make(NOW_S - 1, deadline_time_s=NOW_S + 5)
    assert gateway.claim(NOW_S + 4) == begun
    assert gateway.claim(NOW_S + 6) is None
    for job_id in (late, paused):
        job = gateway.store.get(job_id)
        assert job.state is JobState.FAILED and job.failure.code == "DEADLINE_EXCEEDED" and job.attempts == 0
    assert gateway.store.get(begun).state is JobState.RUNNING
    assert gateway.queue.expire(NOW_S + 6) == []


def test_jobs_of_a_lost_gateway_go_on_elsewhere_and_it_can_write_nothing_any_more(database):
    lost, other = Gateway(database, "lost"), Gateway(database, "other")
    job_id = lost.make()
    assert lost.claim() == job_id
    assert other.queue.take_from_lost(NOW_S) == (0, []), "its lease lasts"
    lose(database, "lost")
    assert other.queue.take_from_lost(NOW_S) == (1, [])
    assert other.claim() == job_id
    job = other.store.get(job_id)
    assert job.owner == "other" and job.attempts == 2 and "lost" in job.setbacks[0].reason
    assert lost.store.save(job_id, Progress(), {}) is None
    assert lost.store.begin(job_id, NOW_S) is None
    assert lost.store.finish(job_id, Ending.failed("INTERNAL", "no"), NOW_S) is None
    assert lost.queue.strays([job_id]) == {job_id} and other.queue.strays([job_id]) == set()
    assert other.store.finish(job_id, Ending.completed(VIDEO), NOW_S, num_bytes=5).state is JobState.COMPLETED


def test_without_a_lease_nothing_is_taken(database):
    gateway = Gateway(database, "a")
    job_id = gateway.make()
    lose(database, "a")
    assert gateway.claim() is None
    gateway.lease.renew()
    assert gateway.lease.valid and gateway.lease.known() == {"a"}
    assert gateway.claim() == job_id
    gateway.lease.end()
    assert not gateway.lease.valid and gateway.lease.known() == set()


def test_a_job_that_takes_its_gateways_with_it_is_given_up(database):
    keeper = Gateway(database, "keeper")
    job_id = keeper.make()
    for attempt in range(MAX_OWNERS_LOST + 1):
        name = f"victim{attempt}"
        assert Gateway(database, name).claim() == job_id
        lose(database, name)
        freed, failed = keeper.queue.take_from_lost(NOW_S)
        assert (freed, len(failed)) == ((1, 0) if attempt < MAX_OWNERS_LOST else (0, 1))
    job = keeper.store.get(job_id)
    assert job.state is JobState.FAILED and job.failure.code == "ABORTED" and "4 times" in job.failure.message
    assert len(job.setbacks) == MAX_OWNERS_LOST + 1 and keeper.claim() is None


def test_released_jobs_are_taken_first(database):
    leaving, other = Gateway(database, "leaving"), Gateway(database, "other")
    begun, urgent = leaving.make(), None
    assert leaving.claim() == begun
    urgent = leaving.make(priority=9)
    assert leaving.queue.release() == 1
    assert [other.claim(), other.claim()] == [begun, urgent]
    assert other.store.get(begun).setbacks == (), "leaving is nobody's fault"


def test_positions_are_those_of_the_queue(database):
    gateway = Gateway(database, "a")
    jobs = [gateway.store.get(gateway.make(NOW_S + index, priority=index % 3)) for index in range(9)]
    snapshot = gateway.queue.snapshot()
    by_position = sorted(
        jobs,
        key=lambda job: snapshot.position(
            "", job.create_time_s - 600.0 * job.submission.priority, job.submission.priority
        ),
    )
    assert [job.id for job in by_position] == [gateway.claim() for _ in jobs]
    assert snapshot.total == 9 and gateway.queue.snapshot().total == 0


def test_a_batch_is_kept_whole_or_not_at_all_and_once(database):
    gateway = Gateway(database, "a", key=KeyLimits(max_daily_jobs=5))

    def batch(number: int, batch_id: str) -> list[Job]:
        return [
            Job(
                new_job_id(),
                PARAMETERS,
                create_time_s=NOW_S,
                submission=Submission(key_id="key", request_id=f"r.{index}", batch_id=batch_id),
            )
            for index in range(number)
        ]

    kept = gateway.store.create_all(batch(3, "one"), "h")
    assert gateway.store.create_all(batch(3, "two"), "h") == kept, "a repeated request makes nothing"
    with pytest.raises(AlreadyExists):
        gateway.store.create_all(batch(3, "two"), "other")
    found = gateway.store.page(page_size=9, wanted=JobFilter(batch_id="one", oldest_first=True)).jobs
    assert [job.id for job in found] == [job.id for job in kept]
    fresh = [Job(new_job_id(), PARAMETERS, create_time_s=NOW_S, submission=Submission(key_id="key")) for _ in range(3)]
    with pytest.raises(QuotaExceeded):
        gateway.store.create_all(fresh, "h")
    assert len(gateway.store.page(page_size=99).jobs) == 3


def test_request_ids_of_keys_are_apart(database):
    gateway = Gateway(database, "a")
    assert gateway.make(key_id="one", request_id="r") != gateway.make(key_id="two", request_id="r")
    assert gateway.make(key_id="one", request_id="r") == gateway.store.find_request("r", "h", "one").id


@pytest.mark.parametrize("oldest_first", [False, True])
def test_lists_are_filtered_in_both_directions(database, oldest_first):
    gateway = Gateway(database, "a")
    ids = [gateway.make(NOW_S + index, key_id="ab"[index % 2], label=f"l{index % 3}") for index in range(12)]
    for job_id in ids[:4]:
        gateway.store.finish(job_id, Ending.cancelled(), NOW_S)
    order = ids if oldest_first else ids[::-1]

    def listed(**asked: Any) -> list[str]:
        wanted, found, token = JobFilter(oldest_first=oldest_first, **asked), [], ""
        while not found or token:
            page = gateway.store.page(page_size=2, page_token=token, wanted=wanted)
            found += [job.id for job in page.jobs]
            token = page.next_page_token
        return found

    states = frozenset({JobState.QUEUED, JobState.RUNNING})
    assert listed() == order
    assert listed(states=states) == [job_id for job_id in order if ids.index(job_id) >= 4]
    assert listed(key_id="a", states=states) == [i for i in order if ids.index(i) >= 4 and ids.index(i) % 2 == 0]
    assert listed(label="l1") == [job_id for job_id in order if ids.index(job_id) % 3 == 1]
    assert listed(after_id=order[4]) == order[5:]


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(), 0),
        (Retention(max_age_s=55.0), 5),
        (Retention(max_jobs=4), 6),
        (Retention(max_bytes=350), 7),
        (Retention(max_age_s=25.0, max_jobs=9, max_bytes=999), 8),
    ],
)
def test_ended_jobs_go_by_age_number_and_size_oldest_first(database, retention, gone):
    gateway = Gateway(database, "a")
    ids = [gateway.make() for _ in range(10)]
    assert [gateway.claim() for _ in ids] == ids
    waiting = gateway.make()
    for index, job_id in enumerate(reversed(ids)):
        gateway.store.finish(job_id, Ending.completed(VIDEO), NOW_S + 10 * index, num_bytes=100)
    outlived = gateway.queue.outlived(retention, NOW_S + 100, limit=99)
    assert outlived == ids[::-1][:gone] and waiting not in outlived
    assert gateway.queue.outlived(retention, NOW_S + 100, limit=3) == outlived[:3]
