"""What every place for files of jobs and for pictures can do, and how it says that it is away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.errors import Unavailable


class ArtifactsAway(Unavailable):
    """The artifact store cannot be used now; nothing was written under the name, or all of it."""

    reason = "ARTIFACTS_UNAVAILABLE"


@dataclass(frozen=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    num_bytes: int
    modified_s: float
    """Since the epoch."""
    etag: str
    """With its quotes; other bytes have another one, and every gateway tells the same."""


class Store(Protocol):
    """Objects by names like `artifacts/job_.../video.mp4`. A name that is there is whole. Thread-safe; calls block.

    Every call raises ArtifactsAway if the place cannot be reached, within about half a minute.
    """

    def check(self) -> None:
        """Whether it can be read and written.

        Raises:
            CannotStart: it never can, as it was named; says the flag and what to do.
        """

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Keep an object, in the place of what had its name."""

    def get(self, name: str) -> bytes | None:
        """An object; None if there is none of that name."""

    def get_part(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes of an object that has some at `start`, up to `stop` or its end; None if there is none of that name."""

    def find(self, name: str) -> ObjectInfo | None:
        """What is known of an object; None if there is none of that name."""

    def delete(self, name: str) -> None:
        """Remove an object; none being there is no error."""

    def delete_folder(self, folder: str) -> None:
        """Remove all objects whose names begin with `folder` and a slash; none being there is no error."""

    def tidy(self, folder: str) -> int:
        """Remove what killed gateways left half-written in a folder that nobody writes; bytes of what stays."""
