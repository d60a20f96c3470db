"""Objects as files of a folder. Written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from services.gateway.database import CannotStart
from services.gateway.objects.store import ObjectInfo

_UNFINISHED = ".part"


class Folder:
    """A folder of this machine, or one that several share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def check(self) -> None:
        """See `Store`."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the folder {self._root} cannot be made: {error.strerror}"
            raise CannotStart(f"--artifacts-url: {what}; choose another") from None
        if not os.access(self._root, os.W_OK | os.X_OK):
            raise CannotStart(f"--artifacts-url: the folder {self._root} cannot be written; choose another")

    def put(self, name: str, content: bytes | memoryview) -> None:
        """See `Store`. Neither a crash nor a power cut leaves half of a file under its name."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: a gateway that was held to be gone may come back to its own file.
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        try:
            temporary.write_bytes(content)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def get_part(self, name: str, start: int, stop: int) -> bytes | None:
        """See `Store`."""
        try:
            with (self._root / name).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except FileNotFoundError:
            return None

    def find(self, name: str) -> ObjectInfo | None:
        """See `Store`."""
        try:
            status = (self._root / name).stat()
        except FileNotFoundError:
            return None
        return ObjectInfo(status.st_size, status.st_mtime, f'"{status.st_mtime_ns:x}-{status.st_size:x}"')

    def delete(self, name: str) -> None:
        """See `Store`."""
        (self._root / name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """See `Store`."""
        path = self._root / folder
        while path.is_dir():
            # Two may be at it: who cancels a job, and who notices that it was cancelled.
            with suppress(FileNotFoundError):
                shutil.rmtree(path)

    def tidy(self, folder: str) -> int:
        """See `Store`."""
        path = self._root / folder
        for file in path.glob(f"*{_UNFINISHED}"):
            file.unlink(missing_ok=True)
        total = 0
        # A job that is cancelled at its end loses its files meanwhile.
        with suppress(FileNotFoundError):
            for file in path.iterdir():
                total += file.stat().st_size
        return total


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
