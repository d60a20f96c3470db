"""Refuses bodies that say of themselves that they are too long, in the words of their API.

Those that do not say how long they are FastAPI cuts off itself, at the same limit.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.http.errors import answer, failure_of


class BodyLimit:
    """Around routes."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if length.isascii() and length.isdecimal() and int(length) > self._max_body_bytes:
            what = f"got a body of {length[:20]} bytes, allowed is at most {self._max_body_bytes}"
            await answer(scope["path"], failure_of(HTTPException(413, what)))(scope, receive, send)
            return
        await self._app(scope, receive, send)
