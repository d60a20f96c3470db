"""The gate on HTTP's side: around the whole application, whatever its routes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.artifacts import is_job_id
from services.gateway.auth.caller import LOCAL, Caller, Role, acting_as
from services.gateway.auth.gate import Gate, credentials_of
from services.gateway.auth.policy import METRICS_PATH, SOCKET_PREFIX, action_of_http, is_open
from shared.errors import OviError, Unauthenticated

ErrorAnswer = Callable[[str, OviError], Response]
"""A refusal as the family of a path says it."""

_VIDEOS = "/api/videos/"
_EVENTS = "/events"
_POLICY = 1008
"""WebSocket's code for a refusal."""


class HttpGate:
    """Sets the caller of every request, or answers it with a refusal.

    Sockets say who they are in their first message, so their handshakes pass: see `Gate.admit`, which their handlers
    call. What they do before that has no caller, and fails.
    """

    def __init__(self, app: ASGIApp, gate: Gate, answer: ErrorAnswer) -> None:
        self._app = app
        self._gate = gate
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope.get("method", "GET")
        if not self._gate.options.required:
            with acting_as(LOCAL):
                await self._app(scope, receive, send)
            return
        if path == METRICS_PATH and self._gate.options.open_metrics:
            with acting_as(Caller(Role.VIEWER)):
                await self._app(scope, receive, send)
            return
        if is_open(method, path) or method == "OPTIONS" or path.startswith(SOCKET_PREFIX):
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as held:
            try:
                caller = await self._caller(scope, path, method)
                self._gate.check(caller, action_of_http(method), f"{method} {path}", address_of(scope))
                if path.endswith(_EVENTS) or scope["type"] == "websocket":
                    held.enter_context(self._gate.watching(caller))
            except OviError as error:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": _POLICY, "reason": error.message[:100]})
                    return
                refusal = self._answer(path, error)
                if isinstance(error, Unauthenticated):
                    refusal.headers["www-authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
            held.enter_context(acting_as(caller))
            await self._app(scope, receive, send)

    async def _caller(self, scope: Scope, path: str, method: str) -> Caller:
        job_id = path.removeprefix(_VIDEOS).removesuffix(".mp4")
        if method in ("GET", "HEAD") and path.startswith(_VIDEOS) and is_job_id(job_id):
            query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
            if (linked := self._gate.admit_link(path, query, address_of(scope), job_id)) is not None:
                return linked
        return await self._gate.admit(credentials_of(Headers(scope=scope)), address_of(scope))


def address_of(scope: Scope) -> str:
    """The other end's address; of a proxy's client where uvicorn trusts the proxy."""
    client = scope.get("client")
    return client[0] if client else ""
