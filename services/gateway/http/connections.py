"""Connections of clients: how many, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass

import h11
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from services.gateway.http.errors import answer, failure_of
from shared.logging import get_logger

log = get_logger(__name__)

_SPARE_FILES = 5120
"""Beside these connections: those of gRPC, the database, clips, stages."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Of one port."""

    max_connections: int
    """Open at once, event streams and sockets among them; those beyond it are answered with 503."""
    max_refused: int = 256
    """Open at once to be answered so; those beyond it are closed."""
    head_s: float = 10.0
    """Seconds for TLS's handshake; again from there, or from a later request's first byte, to the end of the head."""
    body_s: float = 600.0
    """Seconds from there to the end of its body."""
    idle_s: int = 5
    """Seconds that a connection is kept open after an answer."""


class BoundedProtocol(H11Protocol):
    """A connection within limits."""

    def __init__(self, limits: ConnectionLimits, config: Config, server_state: ServerState) -> None:
        """
        Args:
            limits: of the port.
            config: uvicorn's.
            server_state: has the connections of the port.
        """
        super().__init__(config, server_state, app_state={})
        self._limits = limits
        self._over = False
        self._awaited = ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        over = len(self.connections) - self._limits.max_connections
        self._over = over > 0
        if over > self._limits.max_refused:
            transport.abort()
        elif self._over:
            self.app = self._refuse
        self._await("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await(self._missing())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await(self._missing())

    def _missing(self) -> str:
        """The part of a request that the client has begun and not ended."""
        if self.transport.get_protocol() is not self:
            return ""  # It is a WebSocket now.
        if self.conn.their_state is h11.IDLE:
            return "head" if self.conn.trailing_data[0] else ""
        return "body" if self.conn.their_state is h11.SEND_BODY else ""

    def _should_upgrade(self) -> bool:
        return not self._over and super()._should_upgrade()

    def _await(self, part: str) -> None:
        """Give the client its time for a part of a request; the clock of a part that is awaited already goes on."""
        if part == self._awaited:
            return
        self._awaited = part
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if part:
            limit_s = self._limits.head_s if part == "head" else self._limits.body_s
            self._timer = self.loop.call_later(limit_s, self._let_go)

    def _let_go(self) -> None:
        log.debug("client was too slow", awaited=self._awaited)
        self.transport.abort()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        what = f"this gateway has {self._limits.max_connections} open connections, which is its limit; try again soon"
        response = answer(scope["path"], failure_of(HTTPException(503, what)))
        response.headers["connection"] = "close"
        await response(scope, receive, send)


def make_room(max_connections: int) -> None:
    """Raise the process's soft limit of open files to what so many connections need, as far as it may."""
    wanted = max_connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log.warning("too few open files allowed for so many connections", allowed=possible, needed=wanted)
