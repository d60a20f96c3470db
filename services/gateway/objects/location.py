"""Where the artifact store is: `--artifacts-url`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote, urlsplit

from services.gateway.objects.bucket import Bucket
from services.gateway.objects.folder import Folder
from services.gateway.objects.store import ArtifactsAway, Store
from shared.logging import get_logger

log = get_logger(__name__)

_BUCKETS = ("s3", "gs")
_RETRY_S = 1.0


def checked_url(text: str) -> str:
    """The text, if it names an artifact store; empty names the data folder.

    Raises:
        ValueError: it names none, or has a password in it.
    """
    if not text:
        return text
    url = urlsplit(text)
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError("--artifacts-url: has more than a place; keys come from the environment (AWS_ACCESS_KEY_ID)")
    folder = url.scheme == "file" and not url.netloc and url.path.startswith("/")
    if not folder and not (url.scheme in _BUCKETS and url.netloc):
        allowed = "file:///FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        raise ValueError(f"--artifacts-url: got {text!r}, allowed is {allowed}, or nothing for the data folder")
    return text


def open_store(url: str, data_dir: Path) -> Store:
    """The store of a checked URL; nothing is called yet.

    Raises:
        CannotStart: the environment does not make sense for it.
    """
    if not url:
        return Folder(data_dir)
    if url.startswith("file:"):
        return Folder(Path(unquote(urlsplit(url).path)))
    return Bucket(url)


async def until_usable(store: Store) -> None:
    """Wait for a store that is away.

    Raises:
        CannotStart: it can never be used.
    """
    while True:
        try:
            await asyncio.to_thread(store.check)
            return
        except ArtifactsAway as error:
            log.warning("waiting for the artifact store", reason=error.message)
            await asyncio.sleep(_RETRY_S)
