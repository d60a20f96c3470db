"""Objects in a bucket: of S3 and what speaks like it, or of Google Cloud Storage.

An object is put by one request, so it is there as a whole or not at all, and no unfinished upload is ever left behind.
Calls are the library's blocking ones: its asynchronous ones call Python from threads that outlive the interpreter.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from services.gateway.database import CannotStart
from services.gateway.objects.store import ArtifactsAway, ObjectInfo

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_CONNECT_S = 5
_SMALL_S = 10
"""Of a request that moves at most a few MiB."""
_LARGE_S = 30
"""Of a request that moves a whole object: 169 MB, the largest checkpoint, at 6 MB/s."""
_RETRIES = 3
_RETRY_S = 5
"""After so many seconds a request that failed is not repeated."""
_CHECKS = "checks"
_NEVER = re.compile(r"status code: (?!408|429)[34]\d\d")
"""An answer that repeating does not change: access refused, no such bucket, another region."""
_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


class Bucket:
    """A bucket, or all names of a bucket that begin alike."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: s3://BUCKET/PREFIX or gs://BUCKET/PREFIX. Where it is and who is asking comes from the environment, as
                the tools of these services have it.

        Raises:
            CannotStart: the environment does not make sense for it.
        """
        self._url = url
        try:
            self._small, self._large = (_opened(url, seconds) for seconds in (_SMALL_S, _LARGE_S))
        except (BaseError, OSError, ValueError) as error:
            raise CannotStart(f"--artifacts-url {url}: {_first_line(error)}") from None

    def check(self) -> None:
        """See `Store`: by an object that is written, read, listed and deleted."""
        name = f"{_CHECKS}/{secrets.token_hex(8)}"  # of its own: several gateways may start at once
        try:
            obstore.put(self._small, name, b"ovi-serve", use_multipart=False)
            obstore.get(self._small, name)
            obstore.list(self._small, _CHECKS).collect()
            obstore.delete(self._small, [name])
        except (BaseError, FileNotFoundError) as error:
            if _NEVER.search(str(error)):
                what = f"--artifacts-url {self._url} cannot be used: {_first_line(error)}"
                how = "the bucket has to exist, and its keys (AWS_ACCESS_KEY_ID and so on) to allow all but its removal"
                raise CannotStart(f"{what}; {how}") from None
            raise self._away(error) from None

    def put(self, name: str, content: bytes | memoryview) -> None:
        """See `Store`."""
        try:
            obstore.put(self._large, name, content, use_multipart=False)
        except (BaseError, FileNotFoundError) as error:
            raise self._away(error) from None

    def get(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            with self._reached():
                return bytes(obstore.get(self._large, name).bytes())
        except FileNotFoundError:
            return None

    def get_part(self, name: str, start: int, stop: int) -> bytes | None:
        """See `Store`."""
        try:
            with self._reached():
                return bytes(obstore.get_range(self._small, name, start=start, end=stop))
        except FileNotFoundError:
            return None

    def find(self, name: str) -> ObjectInfo | None:
        """See `Store`."""
        try:
            with self._reached():
                meta = obstore.head(self._small, name)
        except FileNotFoundError:
            return None
        num_bytes, modified_s = meta["size"], meta["last_modified"].timestamp()
        return ObjectInfo(num_bytes, modified_s, meta["e_tag"] or f'"{modified_s:.0f}-{num_bytes:x}"')

    def delete(self, name: str) -> None:
        """See `Store`."""
        self._delete([name])

    def delete_folder(self, folder: str) -> None:
        """See `Store`."""
        self._delete([name for name, _ in self._listed(folder)])

    def tidy(self, folder: str) -> int:
        """See `Store`. Nothing is ever half-written here."""
        return sum(num_bytes for _, num_bytes in self._listed(folder))

    def _delete(self, names: list[str]) -> None:
        if not names:
            return
        try:
            with self._reached():
                obstore.delete(self._small, names)
        except FileNotFoundError:
            return

    def _listed(self, folder: str) -> list[tuple[str, int]]:
        with self._reached():
            return [(entry["path"], entry["size"]) for entry in obstore.list(self._small, folder).collect()]

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise self._away(error) from None

    def _away(self, error: Exception) -> ArtifactsAway:
        what = f"the artifact store {self._url} cannot be used now ({_first_line(error)})"
        return ArtifactsAway(f"{what}; try again soon, and if it lasts look at the bucket and its keys")


def _opened(url: str, request_s: int) -> obstore.store.ObjectStore:
    plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    for name in _ENDPOINTS:
        if os.environ.get(name, "").startswith("http://") and not plain:
            raise ValueError(f"{name} is not https; AWS_ALLOW_HTTP=true allows plain text, for a network of your own")
    client: ClientConfig = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "timeout": timedelta(seconds=request_s),
    }
    if authority := os.environ.get("AWS_CA_BUNDLE"):
        client["root_certificate"] = Path(authority).read_bytes()
    retry: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)}
    return from_url(url, client_options=client, retry_config=retry)


def _first_line(error: Exception) -> str:
    """The library puts a dump of its request below."""
    return str(error).splitlines()[0].strip()
