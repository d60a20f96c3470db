"""Writers of one SQLite file wait for each other in the process: none finds it locked, and none keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.gateway.database import open_database

THREADS, WRITES = 8, 40


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """On which SQLite does not wait for a writer, but refuses the next one at once."""
    database = open_database(tmp_path / "turns.sqlite3")

    @sa.event.listens_for(database, "connect")
    def refuse_at_once(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA busy_timeout=0")

    with database.begin() as connection:
        connection.execute(sa.text("CREATE TABLE notes (number INTEGER PRIMARY KEY)"))
    yield database
    database.dispose()


def write(engine: sa.Engine, number: int) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO notes VALUES (:number)"), {"number": number})


def numbers(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT count(*) FROM notes")).scalar_one())


def test_many_writers_never_find_the_file_locked(engine: sa.Engine) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda number: write(engine, number), range(THREADS * WRITES)))
    assert numbers(engine) == THREADS * WRITES


def test_a_writer_that_fails_or_is_dropped_does_not_keep_the_turn(engine: sa.Engine) -> None:
    write(engine, 1)
    with pytest.raises(sa.exc.IntegrityError):
        write(engine, 1)
    with pytest.raises(KeyError), engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO notes VALUES (2)"))
        raise KeyError
    dropped = engine.connect()
    dropped.execute(sa.text("INSERT INTO notes VALUES (3)"))
    dropped.invalidate()
    dropped.close()
    raw = engine.raw_connection()
    raw.cursor().executemany("INSERT INTO notes VALUES (?)", [(4,), (5,)])
    raw.close()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(write, engine, 6).result(10)
    assert numbers(engine) == 2, "the first and the last"


def test_who_reads_does_not_wait(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO notes VALUES (1)"))
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(numbers, engine).result(10) == 0
    assert numbers(engine) == 1
