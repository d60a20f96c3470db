"""The tables of older versions are taken over with every job in them; those of newer ones are refused."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from services.gateway.auth import key_store
from services.gateway.config import PipelineOptions
from services.gateway.database import CannotStart, database_url, open_database, open_postgres
from services.gateway.http.webhooks import store as webhook_store
from services.gateway.job_side import JobSide
from services.gateway.jobs.admission import NoLimits
from services.gateway.jobs.domain import DEFAULT_PRIORITY, JobState
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.schema import metadata
from services.gateway.jobs.store import JobStore
from services.gateway.metrics import GatewayMetrics
from services.gateway.migrations import VERSION_TABLE, NewerDatabase, migrate
from tests.postgres import running_postgres

FIRST_VERSION = """
CREATE TABLE jobs (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR NOT NULL, request_id VARCHAR,
    request_hash VARCHAR NOT NULL, parameters JSON NOT NULL, state VARCHAR NOT NULL, stage VARCHAR NOT NULL,
    done INTEGER NOT NULL, total INTEGER NOT NULL, error_code VARCHAR, error_message VARCHAR, video JSON,
    create_time_s FLOAT NOT NULL, start_time_s FLOAT, end_time_s FLOAT, attempts INTEGER NOT NULL,
    stage_seconds JSON NOT NULL, UNIQUE (id), UNIQUE (request_id)
);
CREATE INDEX ix_jobs_state ON jobs (state);
"""
PARAMETERS = (
    '{"prompt": "a cat", "video_negative_prompt": "", "audio_negative_prompt": "", "model": "720x720_5s", "height": 64,'
    ' "width": 64, "num_frames": 121, "options": {"num_inference_steps": 4, "video_guidance_scale": 4.0,'
    ' "audio_guidance_scale": 3.0, "flow_shift": 5.0, "solver": "unipc", "slg_layer": 11, "seed": 1}, "image_id": ""}'
)
INSERT = (
    "INSERT INTO jobs (seq, id, request_id, request_hash, parameters, state, stage, done, total, create_time_s,"
    " attempts, stage_seconds) VALUES (?, ?, ?, 'h', ?, ?, 'waiting', 0, 0, ?, 0, '{}')"
)


def first_version(path: Path) -> list[str]:
    """A database as the first version left it: a job that ran, two that waited."""
    rows = [(7, "job_A", "r", "running", 10.0), (9, "job_B", None, "queued", 11.0), (12, "job_C", None, "queued", 12.0)]
    connection = sqlite3.connect(path)
    with connection:
        connection.executescript(FIRST_VERSION)
        connection.executemany(INSERT, [(seq, id_, r, PARAMETERS, state, at) for seq, id_, r, state, at in rows])
    connection.close()
    return [row[1] for row in rows]


def test_jobs_of_the_first_version_are_taken_over_and_go_on(tmp_path):
    path = tmp_path / "ovi.sqlite3"
    ids = first_version(path)
    engine = open_database(path)
    migrate(engine)
    migrate(engine)
    store = JobStore(engine, "me")
    jobs = [store.get(job_id) for job_id in ids]
    assert [job.state for job in jobs] == [JobState.RUNNING, JobState.QUEUED, JobState.QUEUED]
    assert jobs[0].parameters.prompt == "a cat" and {job.submission.priority for job in jobs} == {DEFAULT_PRIORITY}
    assert store.find_request("r", "h") == jobs[0]
    queue = JobQueue(engine, "me", NoLimits(), shared=False)
    assert [queue.claim(20.0).id for _ in ids] == ids, "the one that was begun first, then in order"
    engine.dispose()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_migrations_make_the_tables_that_the_code_uses(tmp_path, kind):
    assert {key_store, webhook_store}, "their tables are in the same metadata"
    if kind == "sqlite":
        _check_tables(open_database(tmp_path / "ovi.sqlite3"))
    else:
        with running_postgres() as postgres:
            _check_tables(open_postgres(database_url(postgres.new_database())))


def _check_tables(engine: sa.Engine) -> None:
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: migrate(engine), range(3)))
    with engine.connect() as connection:
        options = {"include_name": lambda name, kind, parents: kind != "table" or name in metadata.tables}
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, **options})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_a_failed_migration_leaves_the_tables_as_they_were(tmp_path):
    path = tmp_path / "ovi.sqlite3"
    ids = first_version(path)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE leases (something_else INTEGER)")
    connection.close()
    engine = open_database(path)
    with pytest.raises(sa.exc.OperationalError, match="leases"):
        migrate(engine)
    with engine.begin() as live:
        assert list(live.execute(sa.text("SELECT id FROM jobs ORDER BY seq")).scalars()) == ids
        live.execute(sa.text("DROP TABLE leases"))
    migrate(engine)
    assert JobStore(engine).get(ids[0]).id == ids[0]
    engine.dispose()


def test_the_tables_of_a_later_version_are_refused(tmp_path):
    engine = open_database(tmp_path / "ovi.sqlite3")
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(NewerDatabase, match="9999"):
        migrate(engine)
    engine.dispose()


def test_a_disk_that_is_full_at_the_start_is_said(tmp_path: Path) -> None:
    """Not that the file should be moved away: nothing is wrong with it."""
    options = PipelineOptions(max_concurrent_jobs=1, worker_wait_s=1.0, stage_timeout_s=1.0)
    side = JobSide(tmp_path, None, NoLimits(), GatewayMetrics(), options)

    @sa.event.listens_for(side.database, "connect")
    def leave_no_room(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA max_page_count=5")

    with pytest.raises(CannotStart, match=r"ovi\.sqlite3: the disk of the data folder is full; free some space"):
        asyncio.run(side.start())
    side.tracker.close()
    side.database.dispose()
