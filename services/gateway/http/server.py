"""An ASGI application on a port of the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from shared.logging import get_logger
from shared.tls import PLAIN, Tls

log = get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the gRPC side decides when the process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpSide:
    """The application on a port."""

    def __init__(
        self, app: ASGIApp, *, host: str, port: int, grace_s: float, max_message_bytes: int, tls: Tls = PLAIN
    ) -> None:
        """
        Args:
            app: what to serve.
            host: interface.
            port: TCP port; 0 picks a free one.
            grace_s: seconds that answers under way have to end.
            max_message_bytes: largest WebSocket message taken.
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
            timeout_graceful_shutdown=max(1, int(grace_s)),
            ssl_certfile=tls.cert,
            ssl_keyfile=tls.key,
            ssl_ca_certs=None if tls.client_ca is None else str(tls.client_ca),
            ssl_cert_reqs=ssl.CERT_NONE if tls.client_ca is None else ssl.CERT_REQUIRED,
        )
        self._server = _Server(config)
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
