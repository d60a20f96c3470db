"""A file of the artifact store as an answer, in pieces; a part of it by Range (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.gateway.objects import ObjectInfo

_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII)


class FileAnswer(Response):
    """Answers GET and HEAD. Nothing is read before it is asked for, and never the whole file at once."""

    def __init__(
        self,
        info: ObjectInfo,
        pieces: Callable[[int, int], AsyncIterator[bytes]],
        *,
        media_type: str,
        filename: str,
        as_download: bool,
    ) -> None:
        """
        Args:
            info: of the file.
            pieces: its bytes from a first one up to another.
            media_type: of the answer.
            filename: that a browser saves it under; ASCII.
            as_download: tell a browser to save it rather than to show it.
        """
        kind = "attachment" if as_download else "inline"
        headers = {
            "accept-ranges": "bytes",
            "content-disposition": f'{kind}; filename="{filename}"',
            "etag": info.etag,
            "last-modified": formatdate(info.modified_s, usegmt=True),
        }
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._info = info
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what the request wants of it."""
        asked = Headers(scope=scope)
        size = self._info.num_bytes
        if self._info.etag in asked.get("if-none-match", ""):
            await self._send(304, None, scope, receive, send)
            return
        part = wanted_part(asked.get("range"), size) if self._is_same(asked.get("if-range")) else (0, size)
        if part is None:
            self.headers["content-range"] = f"bytes */{size}"
            await self._send(416, (0, 0), scope, receive, send)
        elif part == (0, size):
            await self._send(200, part, scope, receive, send)
        else:
            self.headers["content-range"] = f"bytes {part[0]}-{part[1] - 1}/{size}"
            await self._send(206, part, scope, receive, send)

    def _is_same(self, if_range: str | None) -> bool:
        return if_range is None or if_range in (self.headers["etag"], self.headers["last-modified"])

    async def _send(
        self, status: int, part: tuple[int, int] | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers = dict(self.headers)
        if part is not None:
            headers["content-length"] = str(part[1] - part[0])
        if part is None or part[0] == part[1] or scope["method"] == "HEAD":
            await Response(status_code=status, headers=headers)(scope, receive, send)
            return
        # The first piece before the status: a store that is away is said as such.
        pieces = self._pieces(*part)
        first = await anext(pieces)
        await StreamingResponse(_chained(first, pieces), status, headers)(scope, receive, send)


def wanted_part(header: str | None, num_bytes: int) -> tuple[int, int] | None:
    """The part of a file that a Range header names, as its first byte and the one behind its last.

    Args:
        header: of the request. None, another unit, several parts, or what is no range mean the whole file, which the
            RFC allows.
        num_bytes: of the file.

    Returns:
        None if nothing of the file lies in the range.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return 0, num_bytes
    first, last = match.groups()
    if not first:
        start, stop = max(0, num_bytes - int(last)), num_bytes
    else:
        start, stop = int(first), min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return 0, num_bytes
    return (start, stop) if start < stop else None


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
