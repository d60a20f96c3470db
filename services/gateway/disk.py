"""A full disk and a database that is away, told apart from everything else that can go wrong with a file or a table."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator

import sqlalchemy as sa
from safetensors import SafetensorError

from shared.errors import DiskFull, Unavailable

_PRIMARY_CODE = 0xFF
"""SQLite's extended codes hold the primary one in their lowest byte."""


class DatabaseAway(Unavailable):
    """The database cannot be reached, or was stopped under a transaction; nothing was changed as far as is known."""

    reason = "DATABASE_UNAVAILABLE"


@contextlib.contextmanager
def database_away_is_said() -> Iterator[None]:
    """Around transactions.

    Raises:
        DatabaseAway: instead of what the driver calls it.
    """
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
        raise DatabaseAway(f"the database cannot be used now ({error.orig}); try again soon") from None
    except sa.exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise DatabaseAway(f"the database was stopped ({error.orig}); try again soon") from None
    except sa.exc.TimeoutError:
        raise DatabaseAway("all connections to the database are in use; try again soon") from None


@contextlib.contextmanager
def disk_full_is_said() -> Iterator[None]:
    """Around anything that writes into the data folder.

    Raises:
        DiskFull: instead of what the library at work calls it.
    """
    try:
        yield
    except (OSError, SafetensorError, sa.exc.OperationalError) as error:
        if not _is_disk_full(error):
            raise
        raise DiskFull("the disk of the data folder is full; free some space and try again") from None


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, sa.exc.OperationalError):
        cause = error.orig
        return (
            isinstance(cause, sqlite3.OperationalError)
            and getattr(cause, "sqlite_errorcode", 0) & _PRIMARY_CODE == sqlite3.SQLITE_FULL
        )
    # The library gives the system's error as text only.
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)
