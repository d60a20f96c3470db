"""A full disk, told apart from everything else that can go wrong with a file or a table."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator

import sqlalchemy as sa
from safetensors import SafetensorError

from shared.errors import DiskFull

_PRIMARY_CODE = 0xFF
"""SQLite's extended codes hold the primary one in their lowest byte."""


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
