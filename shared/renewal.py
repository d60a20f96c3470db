"""Files that are renewed while the process runs, such as certificates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from shared.logging import get_logger

log = get_logger(__name__)

Made = TypeVar("Made")


class Renewal(Generic[Made]):
    """What is made of some files, made again when their bytes have changed.

    Bytes are compared, not times: the files are small, and whichever way they are replaced, nothing is missed.
    """

    def __init__(self, side: str, paths: Sequence[Path], make: Callable[[], Made]) -> None:
        """
        Args:
            side: for the log: what it is made for.
            paths: of the files.
            make: reads and checks them; raises ValueError or OSError if they cannot be used.

        Raises:
            ValueError, OSError: as `make`.
        """
        self._paths = tuple(paths)
        self._log = log.bind(side=side, files=[str(path) for path in self._paths])
        self._make = make
        self._lock = threading.Lock()
        self._seen: tuple[bytes | None, ...] | None = self._read()
        self.current = make()
        """Made of the last files that could be used."""

    def look(self) -> bool:
        """Read the files; True if they have made something new. Useless ones are logged and change nothing."""
        with self._lock:
            found = self._read()
            if found == self._seen:
                return False
            self._seen = found
            try:
                made = self._make()
            except (ValueError, OSError) as error:
                self._log.warning("renewed files cannot be used, the ones before stay in use", reason=str(error))
                return False
            if self._read() != found:
                # Replaced meanwhile, so nobody knows which ones were read; the next look tells.
                self._seen = None
                return False
            self.current = made
            self._log.info("renewed files are in use")
            return True

    def _read(self) -> tuple[bytes | None, ...]:
        return tuple(_bytes_of(path) for path in self._paths)


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
