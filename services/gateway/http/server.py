"""An ASGI application on a port of the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from services.gateway.http.connections import BoundedProtocol, ConnectionLimits, make_room
from shared.logging import get_logger
from shared.tls import PLAIN, Tls

log = get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn with bounded connections, and without signal handlers: the gRPC side decides when the process ends."""

    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits, context: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._limits = limits
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        limit_s = None if self._context is None else self._limits.head_s
        self.servers = [
            await loop.create_server(
                lambda: BoundedProtocol(self._limits, self.config, self.server_state),
                sock=listening,
                ssl=self._context,
                backlog=self.config.backlog,
                ssl_handshake_timeout=limit_s,
                ssl_shutdown_timeout=limit_s,
            )
            for listening in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpSide:
    """The application on a port."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        grace_s: float,
        max_message_bytes: int,
        limits: ConnectionLimits,
        tls: Tls = PLAIN,
    ) -> None:
        """
        Args:
            app: what to serve.
            host: interface.
            port: TCP port; 0 picks a free one.
            grace_s: seconds that answers under way have to end.
            max_message_bytes: largest WebSocket message taken.
            limits: of connections.
            tls: certificates of the port.

        Raises:
            OSError: the port is taken.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        # Its connections inherit it. An answer's head and body are two writes, and the second would wait for the client
        # to acknowledge the first, which takes 40 ms; asyncio sees to it only for sockets that it has made.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        log.info("http listening", address=f"{host}:{self._socket.getsockname()[1]}", tls=tls.serves)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="wsproto",
            ws_max_size=max_message_bytes,
            timeout_keep_alive=limits.idle_s,
            timeout_graceful_shutdown=max(1, int(grace_s)),
        )
        make_room(limits.max_connections)
        self._server = _Server(config, limits, tls.server_context())
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Answer what has been asked, then stop."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()
