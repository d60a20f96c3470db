"""SQLite connections whose writers take turns within the process, which owns the file.

SQLite itself lets a writer that finds another at work sleep and look again, for up to 0.1 s at a time and in no order:
of sixteen clients that create jobs at once, one in a hundred waits for most of a second so.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from typing import Any

_WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE", "BEGIN IMMEDIATE")


class TakingTurns(sqlite3.Connection):
    """A connection that has the turn from before a transaction writes until after it has ended."""

    _turns: threading.Lock
    _patience_s: float
    _mine = False

    def share(self, turns: threading.Lock, patience_s: float) -> None:
        """
        Args:
            turns: held by whoever writes; the same for all connections to a file.
            patience_s: how long to wait for it; then SQLite says whether there is still somebody else.
        """
        self._turns, self._patience_s = turns, patience_s

    def cursor(self, factory: Any = None) -> Any:
        """One that takes the turn before it writes."""
        return super().cursor(factory or _Cursor)

    def commit(self) -> None:
        """Commit; the turn goes on."""
        try:
            super().commit()
        finally:
            self.pass_on()

    def rollback(self) -> None:
        """Roll back; the turn goes on."""
        try:
            super().rollback()
        finally:
            self.pass_on()

    def close(self) -> None:
        """Close, with which a transaction ends."""
        try:
            super().close()
        finally:
            self._give()

    def take(self, statement: str) -> None:
        """Wait for the turn if this statement begins to write."""
        if not self._mine and not self.in_transaction and statement.lstrip()[:16].upper().startswith(_WRITES):
            self._mine = self._turns.acquire(timeout=self._patience_s)

    def pass_on(self) -> None:
        """Let others write, unless a transaction is still open."""
        if not self.in_transaction:
            self._give()

    def _give(self) -> None:
        if self._mine:
            self._mine = False
            self._turns.release()


class _Cursor(sqlite3.Cursor):
    connection: TakingTurns

    def execute(self, statement: str, parameters: Any = ()) -> _Cursor:
        self.connection.take(statement)
        try:
            return super().execute(statement, parameters)
        finally:
            self.connection.pass_on()

    def executemany(self, statement: str, parameters: Iterable[Any]) -> _Cursor:
        self.connection.take(statement)
        try:
            return super().executemany(statement, parameters)
        finally:
            self.connection.pass_on()
