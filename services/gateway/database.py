"""The gateway's database: a file with one owner, or PostgreSQL with several gateways on it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa

from services.gateway.turns import TakingTurns
from shared.errors import FailedPrecondition

DATABASE_FILE = "ovi.sqlite3"
_LOCK_FILE = "gateway.lock"
_BUSY_TIMEOUT_MS = 30_000
_IDLE_IN_TRANSACTION_S = 8
_LOCK_TIMEOUT_S = 15


class CannotStart(FailedPrecondition):
    """The data folder or a port cannot be used as it is; starting again does not help."""

    reason = "CANNOT_START"


class DataDirInUse(CannotStart):
    """Another gateway owns the data folder."""

    reason = "DATA_DIR_IN_USE"


class DataDirLock:
    """Makes one process the owner of a data folder until it ends, however it ends."""

    def __init__(self, data_dir: Path) -> None:
        """
        Args:
            data_dir: made if it is not there.

        Raises:
            DataDirInUse: another process owns it.
            CannotStart: it cannot be made or written.
        """
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(data_dir / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CannotStart(
                f"--data-dir {data_dir} cannot be used: {error.strerror}; choose another folder"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise DataDirInUse(
                f"{data_dir} is in use by another gateway (process {owner});"
                " stop it first, or give this one a --data-dir of its own"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)


def database_url(text: str) -> sa.URL | None:
    """The database that `--database-url` names; None if it is empty: the file in the data folder.

    Raises:
        ValueError: it is not PostgreSQL's.
    """
    if not text:
        return None
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        url = None
    if url is None or url.drivername not in ("postgresql", "postgresql+psycopg") or not url.database:
        shown = str(url) if url is not None else "something else"
        allowed = "postgresql+psycopg://USER:PASSWORD@HOST/NAME, or nothing for the file in the data folder"
        raise ValueError(f"--database-url: got {shown}, allowed is {allowed}")
    return url.set(drivername="postgresql+psycopg")


def open_postgres(url: sa.URL) -> sa.Engine:
    """An engine on PostgreSQL. Nothing waits for ever: not for a server that is away, nor for one that is stopped."""
    settings = {
        # A gateway that was stopped in the middle of a transaction must not hold its locks.
        "idle_in_transaction_session_timeout": f"{_IDLE_IN_TRANSACTION_S}s",
        "lock_timeout": f"{_LOCK_TIMEOUT_S}s",
        "synchronous_commit": "on",
    }
    return sa.create_engine(
        url,
        pool_size=10,
        max_overflow=20,
        pool_timeout=10,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": 5,
            "tcp_user_timeout": 10_000,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": "ovi-gateway",
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        },
    )


def open_database(path: Path) -> sa.Engine:
    """An engine on a SQLite file: write-ahead log, every commit on disk before it is answered, writers take turns."""
    # Its errors go to logs, where prompts do not belong.
    engine = sa.create_engine(
        f"sqlite:///{path}", pool_size=10, hide_parameters=True, connect_args={"factory": TakingTurns}
    )
    turns = threading.Lock()

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.share(turns, _BUSY_TIMEOUT_MS / 1e3)
        connection.isolation_level = "IMMEDIATE"
        for pragma in (
            "journal_mode=WAL",
            f"busy_timeout={_BUSY_TIMEOUT_MS}",
            "foreign_keys=ON",
            # NORMAL may lose the last commits when the power goes.
            "synchronous=FULL",
        ):
            connection.execute(f"PRAGMA {pragma}")

    return engine
