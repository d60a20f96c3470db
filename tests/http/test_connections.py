"""Connections of clients: their number, slow and silent ones, and everybody else meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from services.gateway.http.connections import ConnectionLimits
from services.gateway.http.options import DEFAULT_MAX_CONNECTIONS, add_http_flags, http_options
from services.gateway.http.server import HttpSide
from shared.tls import PLAIN, Tls
from tests.certificates import Authority
from tests.grpc.gateway_client import running_gateway
from tests.service_process import free_port

END_S = 20.0
"""In which everything here has to happen; far more than it takes."""
HEAD_S, BODY_S = 1.0, 1.5
SHORT = ConnectionLimits(3, max_refused=1, head_s=HEAD_S, body_s=BODY_S, idle_s=1)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
UPGRADE = (
    b"GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PING, PONG = b"\x89\x80\x00\x00\x00\x00", b"\x8a\x00"


async def hello(request: Request) -> Response:
    return PlainTextResponse(f"{len(await request.body())} bytes")


async def events(request: Request) -> Response:
    """Says something, and goes on for as long as the slowest request may take."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"first;"
        await asyncio.sleep(1.2 * max(HEAD_S, BODY_S, SHORT.idle_s))
        yield b"last;"

    return StreamingResponse(parts())


async def converse(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


APP = Starlette(
    routes=[
        Route("/", hello, methods=["GET", "POST"]),
        Route("/events", events),
        WebSocketRoute("/socket", converse),
    ]
)


class Client:
    """A connection that sends what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def slowly(self, data: bytes) -> bytes:
        """What comes before the server ends it, while a byte is sent now and then."""

        async def trickle() -> None:
            for byte in data:
                self.send(bytes([byte]))
                await asyncio.sleep(HEAD_S / 8)

        trickling = asyncio.create_task(trickle())
        try:
            rest = await self.rest()
            assert not trickling.done(), "the server waited for all of it"
        finally:
            trickling.cancel()
        return rest

    async def until(self, end: bytes) -> bytes:
        return await self._reader.readuntil(end)

    async def rest(self) -> bytes:
        """Everything up to the end, which is the server's."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while more := await self._reader.read(1 << 16):
                received += more
        return received

    def close(self) -> None:
        self._writer.close()


@dataclass
class Served:
    """A server with short limits."""

    port: int

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def holding(self) -> Client:
        """A connection with an answer under way."""
        client = await self.connect()
        client.send(GET.replace(b"/", b"/events", 1))
        await client.until(b"first;")
        return client


def serving(test: Callable[[Served], Awaitable[None]], limits: ConnectionLimits = SHORT, tls: Tls = PLAIN) -> None:
    """Run a test beside a server."""

    async def run() -> None:
        port = free_port()
        side = HttpSide(APP, host="127.0.0.1", port=port, grace_s=1, max_message_bytes=1024, limits=limits, tls=tls)
        side.start()
        try:
            async with asyncio.timeout(END_S):
                await test(Served(port))
        finally:
            await side.stop()

    asyncio.run(run())


@pytest.mark.parametrize("before", [b"", GET], ids=["first", "later"])
def test_a_head_that_does_not_come_ends_the_connection_and_others_are_served_meanwhile(before):
    async def test(served: Served) -> None:
        slow, normal = await served.connect(), await served.connect()
        if before:
            slow.send(before)
            await slow.until(b"0 bytes")
        begun_s = time.monotonic()
        letting_go = asyncio.create_task(slow.slowly(GET.replace(b"host", b"x-" + b"y" * 1000)))
        normal.send(GET)
        assert await normal.until(b"0 bytes")
        assert not letting_go.done()
        assert await letting_go == b""
        assert HEAD_S * 0.9 < time.monotonic() - begun_s < END_S / 2

    serving(test)


def test_a_silent_connection_is_ended(tmp_path: Path):
    async def test(served: Served) -> None:
        begun_s = time.monotonic()
        assert await (await served.connect()).rest() == b""
        assert HEAD_S * 0.9 < time.monotonic() - begun_s < END_S / 2

    serving(test)
    pair = Authority(tmp_path, "any").issue("127.0.0.1")
    serving(test, tls=Tls(pair.cert, pair.key))


def test_a_body_that_does_not_come_ends_the_connection():
    async def test(served: Served) -> None:
        client, begun_s = await served.connect(), time.monotonic()
        client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        assert await client.slowly(b"x" * 1000) == b""
        assert BODY_S * 0.9 < time.monotonic() - begun_s < END_S / 2

    serving(test)


def test_a_connection_that_is_kept_for_nothing_is_ended():
    async def test(served: Served) -> None:
        client = await served.connect()
        client.send(GET)
        answer, begun_s = await client.until(b"0 bytes"), time.monotonic()
        assert b" 200 " in answer and await client.rest() == b""
        assert SHORT.idle_s * 0.9 < time.monotonic() - begun_s < END_S / 2

    serving(test)


def test_answers_and_sockets_may_last():
    async def test(served: Served) -> None:
        stream, websocket = await served.holding(), await served.connect()
        websocket.send(UPGRADE)
        assert b" 101 " in await websocket.until(b"\r\n\r\n")
        assert b"last;" in await stream.until(b"last;")
        websocket.send(PING)
        assert await websocket.until(PONG) == PONG
        websocket.close()

    serving(test)


@pytest.mark.parametrize("request_head", [GET, UPGRADE], ids=["request", "socket"])
def test_connections_beyond_the_limit_are_told_so_and_far_beyond_it_closed(request_head):
    async def test(served: Served) -> None:
        held = [await served.holding() for _ in range(SHORT.max_connections)]
        over = await served.connect()
        over.send(request_head[:-2])
        assert await (await served.connect()).rest() == b"", "closed before it has said anything"
        over.send(request_head[-2:])
        head, _, body = (await over.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"connection: close" in head and b"retry-after: " in head
        assert "3 open connections, which is its limit" in json.loads(body)["error"]["message"]
        for client in held:
            assert b"last;" in await client.rest(), "who was there before is not cut"
        after = await served.connect()
        after.send(GET)
        assert b" 200 " in await after.until(b"0 bytes")

    serving(test)


def test_a_thousand_watchers_fit():
    async def test(served: Served) -> None:
        watchers = await asyncio.gather(*(served.holding() for _ in range(1000)))
        one_more = await served.connect()
        one_more.send(GET)
        assert b" 200 " in await one_more.until(b"0 bytes")
        for watcher in watchers:
            watcher.close()

    serving(test, ConnectionLimits(DEFAULT_MAX_CONNECTIONS))


def test_a_gateway_lets_go_of_silent_clients_on_both_ports(stages, tmp_path: Path):
    """With the limits that it has by default, but for the number."""
    with running_gateway(tmp_path / "data", *stages.flags, "--max-connections", "2") as gateway, httpx.Client() as http:
        slow = []
        for at in (gateway.http_url.removeprefix("http://"), gateway.service.address):
            host, _, port = at.rpartition(":")
            slow.append(socket.create_connection((host, int(port)), timeout=END_S))
        slow[0].sendall(b"GET /healthz HTTP/1.1\r\nhost:")
        url = f"{gateway.http_url}/healthz"
        assert http.get(url).status_code == 200
        with httpx.Client() as third:
            refused = third.get(url)
        assert refused.status_code == 503 and "2 open connections" in refused.json()["error"]["message"]
        begun_s = time.monotonic()
        for connection in slow:
            with connection:
                while connection.recv(1 << 16):  # gRPC says its settings first
                    pass
        assert 5 < time.monotonic() - begun_s < END_S
        assert gateway.end_of(gateway.create().id).error.message == ""


@pytest.mark.parametrize("given", ["0", "-1", "1000001"])
def test_a_number_that_makes_no_sense_is_refused(given):
    parser = argparse.ArgumentParser()
    add_http_flags(parser)
    with pytest.raises(ValueError, match=f"--max-connections: got {given}, allowed is 1 to 1000000"):
        http_options(parser.parse_args(["--max-connections", given]))
    assert http_options(parser.parse_args([])).max_connections == DEFAULT_MAX_CONNECTIONS
