"""Uploaded first pictures, kept under the hash of their bytes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import asdict, dataclass

from services.gateway.objects import Store
from shared.errors import NotFound
from shared.pictures import open_picture

_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_MAX_DECODING = 2
"""Pictures decoded at once; one of 50 megapixels takes 150 MB while it is checked."""


@dataclass(frozen=True)
class ImageInfo:
    """A kept picture."""

    id: str
    """SHA-256 of the file in hex digits."""
    height: int
    """Pixels, as seen: turned upright."""
    width: int


class ImageStore:
    """Pictures by id, in the artifact store. Thread-safe; every call raises ArtifactsAway if that cannot be reached."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._decoding = threading.Semaphore(_MAX_DECODING)

    def put(self, data: bytes) -> ImageInfo:
        """Keep a PNG, JPEG or WebP file; the same bytes are kept once.

        Raises:
            InvalidRequest: not a picture, damaged, or too large.
        """
        image_id = hashlib.sha256(data).hexdigest()
        known = self.find(image_id)
        if known is not None:
            return known
        with self._decoding:
            picture = open_picture(data, field="chunk")
        info = ImageInfo(image_id, picture.height, picture.width)
        # What is known of it comes last: where that is, the picture is.
        self._store.put(_name(image_id), data)
        self._store.put(_name(f"{image_id}.json"), json.dumps(asdict(info)).encode())
        return info

    def find(self, image_id: str) -> ImageInfo | None:
        """What is known of a picture; None if it is not here, or the text is no id."""
        if _IMAGE_ID.fullmatch(image_id) is None:
            return None
        known = self._store.get(_name(f"{image_id}.json"))
        return None if known is None else ImageInfo(**json.loads(known))

    def read(self, image_id: str) -> bytes:
        """The file.

        Raises:
            NotFound: it is not here.
        """
        data = None if _IMAGE_ID.fullmatch(image_id) is None else self._store.get(_name(image_id))
        if data is None:
            raise NotFound(f"picture {image_id[:64]!r} is not kept here; upload it again")
        return data


def _name(file_name: str) -> str:
    return f"images/{file_name}"
