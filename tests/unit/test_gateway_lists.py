"""Lists, and what is asked every second, look at a page of jobs and not at all of them, on both databases."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from services.gateway.database import database_url, open_database, open_postgres
from services.gateway.jobs.admission import NoLimits
from services.gateway.jobs.domain import ClipParameters, Ending, Job, JobState, Submission, VideoInfo, new_job_id
from services.gateway.jobs.listing import JobFilter
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.store import JobStore
from services.gateway.migrations import migrate
from shared.sampling_options import SamplingOptions
from tests.postgres import running_postgres

PARAMETERS = ClipParameters("a cat", "blur", "echo", "tiny", 64, 96, 121, SamplingOptions())
MANY, FEW, PAGE = 1500, 12, 8
MOST_STEPS = 2500
"""Of SQLite's machine for a page of each of two states; jobs looked through cost some ten each, and there are 3,000."""
MOST_ROWS = 250
"""That PostgreSQL's plan for the same passes on, from all of its parts, or drops."""
NOW_S = 1e6
_STEPS = 20


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """Jobs of one kind, a few of every kind, and again those of the one kind."""
    if request.param == "sqlite":
        database = open_database(tmp_path_factory.mktemp("lists") / "jobs.sqlite3")
        fill(database)
        yield database
        database.dispose()
        return
    with running_postgres() as postgres:
        database = open_postgres(database_url(postgres.new_database()))
        fill(database)
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE jobs"))
        yield database
        database.dispose()


def fill(database: sa.Engine) -> None:
    migrate(database)
    many = [("many", "many", "", JobState.QUEUED)] * MANY
    kinds = itertools.product(("many", "few"), ("many", "few"), ("", "few"), (JobState.QUEUED, JobState.RUNNING))
    rows = [*many, *(kind for kind in kinds for _ in range(FEW)), *many]
    store = JobStore(database)
    new = []
    for number, (key_id, label, batch_id, state) in enumerate(rows):
        asked = Submission(key_id=key_id, label=label, batch_id=batch_id)
        new.append(Job(new_job_id(), PARAMETERS, create_time_s=float(number), submission=asked, state=state))
    for _, of_key in itertools.groupby(new, lambda job: job.submission.key_id):
        store.create_all(list(of_key), "h")


def steps_of(engine: sa.Engine, call: Callable[[], object]) -> int:
    """What SQLite's machine does in a call."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += _STEPS
        return 0

    def begin(connection: Any, record: Any, proxy: Any) -> None:
        connection.set_progress_handler(count, _STEPS)

    def end(connection: Any, record: Any) -> None:
        connection.set_progress_handler(None, 0)

    sa.event.listen(engine, "checkout", begin)
    sa.event.listen(engine, "checkin", end)
    try:
        call()
    finally:
        sa.event.remove(engine, "checkout", begin)
        sa.event.remove(engine, "checkin", end)
    return steps


def rows_of(engine: sa.Engine, call: Callable[[], object]) -> int:
    """Rows that all parts of PostgreSQL's plans for a call's queries pass on or drop."""
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.startswith(("SELECT", "WITH")):
            asked.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        call()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert asked
    with engine.connect() as connection:
        plans = [
            connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
            for statement, parameters in asked
        ]
    found = [json.loads(plan) if isinstance(plan, str) else plan for plan in plans]
    return sum(passed_on(plan[0]["Plan"]) for plan in found)


def passed_on(part: dict[str, Any]) -> int:
    dropped = sum(part.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck", "Join Filter"))
    own = (part["Actual Rows"] + dropped) * part["Actual Loops"]
    return int(own) + sum(passed_on(below) for below in part.get("Plans", ()))


def check(engine: sa.Engine, call: Callable[[], object], what: object) -> None:
    if engine.dialect.name == "sqlite":
        assert steps_of(engine, call) <= MOST_STEPS, what
    else:
        assert rows_of(engine, call) <= MOST_ROWS, what


def lists() -> Iterator[JobFilter]:
    """Every combination of filters that a list can have."""
    states = [frozenset(wanted) for wanted in ((), (JobState.RUNNING,), (JobState.QUEUED, JobState.RUNNING))]
    states.append(frozenset({JobState.COMPLETED, JobState.FAILED}))
    for chosen in itertools.product(states, (None, "many", "few", "none"), ("", "few"), ("", "many", "few")):
        for oldest_first in (False, True):
            yield JobFilter(*chosen, oldest_first=oldest_first)


def test_a_page_of_any_list_is_read_by_itself(engine: sa.Engine) -> None:
    store = JobStore(engine)
    for wanted in lists():
        check(engine, lambda wanted=wanted: store.page(page_size=PAGE, wanted=wanted), wanted)


def test_a_page_far_behind_is_read_by_itself(engine: sa.Engine) -> None:
    store = JobStore(engine)
    for oldest_first, key_id in itertools.product((False, True), (None, "many")):
        wanted = JobFilter(key_id=key_id, oldest_first=oldest_first)
        deep = store.page(page_size=1000, wanted=wanted)
        token, behind = (
            deep.next_page_token,
            JobFilter(key_id=key_id, oldest_first=oldest_first, after_id=deep.jobs[-1].id),
        )
        check(engine, lambda token=token, wanted=wanted: store.page(page_size=PAGE, page_token=token, wanted=wanted), 0)
        check(engine, lambda wanted=behind: store.page(page_size=PAGE, wanted=wanted), behind)


def test_all_that_is_listed_is_what_was_asked_for(engine: sa.Engine) -> None:
    """Against the filters applied to every job one by one."""
    store = JobStore(engine)
    every: list[Job] = []
    token = ""
    while not every or token:
        page = store.page(page_size=1000, page_token=token, wanted=JobFilter(oldest_first=True))
        every, token = [*every, *page.jobs], page.next_page_token
    assert len(every) == 2 * MANY + 16 * FEW
    for wanted in lists():
        expected = [
            job.id
            for job in every
            if (not wanted.states or job.state in wanted.states)
            and wanted.key_id in (None, job.submission.key_id)
            and wanted.batch_id in ("", job.submission.batch_id)
            and wanted.label in ("", job.submission.label)
        ]
        if not wanted.oldest_first:
            expected.reverse()
        page = store.page(page_size=PAGE, wanted=wanted)
        found = [job.id for job in page.jobs]
        if page.next_page_token:
            page = store.page(page_size=PAGE, page_token=page.next_page_token, wanted=wanted)
            found += [job.id for job in page.jobs]
        assert found == expected[: 2 * PAGE], wanted


def test_what_is_asked_every_second_reads_no_long_queue(engine: sa.Engine) -> None:
    """Last, since it ends jobs."""
    store, queue = JobStore(engine), JobQueue(engine, "", NoLimits(), shared=False)
    check(engine, lambda: queue.head(NOW_S), "the next job")
    for number, job in enumerate(store.page(page_size=1000, wanted=JobFilter(key_id="many")).jobs):
        store.begin(job.id, NOW_S)
        store.finish(job.id, Ending.completed(VideoInfo(1, 64, 96, 121, 24)), NOW_S + number)
    learned = queue.completed_since(NOW_S + 990, 500)
    assert len(learned) == 9
    check(engine, lambda: queue.completed_since(NOW_S + 990, 500), "what was learned")
