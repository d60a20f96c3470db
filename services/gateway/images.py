"""Uploaded first pictures, kept under the hash of their bytes."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from services.gateway.artifacts import settle
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
    """Pictures by id. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._decoding = threading.Semaphore(_MAX_DECODING)
        root.mkdir(parents=True, exist_ok=True)

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
        self._write(f"{image_id}.json", json.dumps(asdict(info)).encode())
        self._write(image_id, data)
        return info

    def find(self, image_id: str) -> ImageInfo | None:
        """What is known of a picture; None if it is not here, or the text is no id."""
        if _IMAGE_ID.fullmatch(image_id) is None or not (self._root / image_id).is_file():
            return None
        return ImageInfo(**json.loads((self._root / f"{image_id}.json").read_bytes()))

    def read(self, image_id: str) -> bytes:
        """The file.

        Raises:
            NotFound: it is not here.
        """
        if self.find(image_id) is None:
            raise NotFound(f"picture {image_id[:64]!r} is not in the data folder; upload it again")
        return (self._root / image_id).read_bytes()

    def _write(self, name: str, data: bytes) -> None:
        temporary = self._root / f"{name}.{secrets.token_hex(4)}.part"
        try:
            temporary.write_bytes(data)
            settle(temporary, self._root / name)
        finally:
            temporary.unlink(missing_ok=True)
