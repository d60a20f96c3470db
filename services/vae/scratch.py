"""Where a clip lies while it is made: a folder that goes with the call or, after a kill, at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import DiskFull
from shared.logging import get_logger

log = get_logger(__name__)

_PREFIX = "ovi-vae-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder among the system's temporary files (TMPDIR), removed at the end.

    It is locked while it is used. The kernel drops the lock with its process, however that ends, so that what a killed
    process left can be told from what another one needs; a process id in the name could not, across containers.

    Raises:
        DiskFull: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX)))
            stack.callback(os.close, _locked(folder))
        except OSError as error:
            what = f"no temporary folder can be made for the clip ({error})"
            raise DiskFull(f"{what}; free some space, or set TMPDIR to a folder that has it") from None
        yield folder


def remove_abandoned() -> None:
    """Remove the folders that killed processes left behind."""
    try:
        parent = Path(tempfile.gettempdir())
    except OSError as error:
        log.warning("no temporary files can be written now", reason=str(error))
        return
    for folder in parent.glob(f"{_PREFIX}*/"):
        # In use, another user's, or gone meanwhile: then it is not ours to remove.
        with contextlib.suppress(OSError):
            lock = _locked(folder)
            try:
                shutil.rmtree(folder)
            finally:
                os.close(lock)
            log.info("temporary files of a killed process were removed", folder=str(folder))


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed.

    Raises:
        OSError: another descriptor holds it, or the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
