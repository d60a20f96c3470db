"""Certificates of callers that are replaced while they call: what servers see, and calls that are under way."""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
from cryptography import x509

from shared.errors import ReferenceLost
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from shared.tls import Tls, add_secure_port, open_channel
from tests.certificates import Authority, Pair

NAME = "127.0.0.1"
END_S = 20.0
ECHO = "/test/Echo"


def serial(cert: Path) -> bytes:
    return str(x509.load_pem_x509_certificate(cert.read_bytes()).serial_number).encode()


def caller_of(context: grpc.aio.ServicerContext) -> bytes:
    (shown,) = context.auth_context()["x509_pem_cert"]
    return str(x509.load_pem_x509_certificate(shown).serial_number).encode()


class Callers(grpc.GenericRpcHandler):
    """Says who calls: once, or after each message of a stream."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def once(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return caller_of(context)

        async def each(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            async for _ in requests:
                yield caller_of(context)

        if details.method == ECHO:
            return grpc.unary_unary_rpc_method_handler(once)
        return grpc.stream_stream_rpc_method_handler(each)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "first")


@pytest.fixture
def own(authority: Authority, tmp_path: Path) -> Tls:
    """Of the caller; its three files are its own."""
    pair, ca = authority.issue("caller.example.com"), tmp_path / "trusted.pem"
    shutil.copy(authority.file, ca)
    return Tls(pair.cert, pair.key, ca=ca)


def calling(authority: Authority, own: Tls, test: Callable[[grpc.aio.Channel, Pair], Awaitable[None]]) -> None:
    """Run a test with a channel to a server that asks for certificates of the authority, and shows this pair."""

    async def run() -> None:
        shown = authority.issue(NAME)
        server = grpc.aio.server(handlers=[Callers()])
        port = add_secure_port(server, NAME, 0, Tls(shown.cert, shown.key, client_ca=authority.file))
        await server.start()
        try:
            async with asyncio.timeout(END_S), open_channel(f"{NAME}:{port}", own) as channel:
                await test(channel, shown)
        finally:
            await server.stop(0)

    asyncio.run(run())


def test_calls_show_a_renewed_certificate_and_those_under_way_go_on(authority, own):
    async def test(channel: grpc.aio.Channel, shown: Pair) -> None:
        before, echo = serial(own.cert), channel.unary_unary(ECHO)
        stream = channel.stream_stream("/test/Each")()
        await stream.write(b"")
        assert await stream.read() == await echo(b"") == before
        authority.issue("caller.example.com")
        after = serial(own.cert)
        assert await echo(b"") == await echo(b"") == after != before
        await stream.write(b"")
        assert await stream.read() == before
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK

    calling(authority, own, test)


def test_damaged_files_change_nothing(authority, own):
    async def test(channel: grpc.aio.Channel, shown: Pair) -> None:
        before, echo = serial(own.cert), channel.unary_unary(ECHO)
        for file in (own.cert, own.key, own.ca):
            whole = file.read_bytes()
            file.write_bytes(whole[:40])
            assert await echo(b"") == before, file
            file.unlink()
            assert await echo(b"") == before, file
            file.write_bytes(whole)
            assert await echo(b"") == before, file

    calling(authority, own, test)


def test_a_new_authority_of_servers_is_trusted_by_calls_that_begin_later(authority, own, tmp_path):
    async def test(channel: grpc.aio.Channel, shown: Pair) -> None:
        echo, second = channel.unary_unary(ECHO), Authority(tmp_path, "second")
        assert await echo(b"") == serial(own.cert)
        own.ca.write_bytes(second.file.read_bytes())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await echo(b"")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        new = second.issue(NAME)
        shutil.copy(new.cert, shown.cert)
        shutil.copy(new.key, shown.key)
        assert await echo(b"", wait_for_ready=True) == serial(own.cert)

    calling(authority, own, test)


def test_closing_ends_calls_of_every_channel(authority, own):
    async def test(channel: grpc.aio.Channel, shown: Pair) -> None:
        streams = []
        for _ in range(2):
            stream = channel.stream_stream("/test/Each")()
            await stream.write(b"")
            assert await stream.read() == serial(own.cert)
            streams.append(stream)
            authority.issue("caller.example.com")
        await channel.close()
        assert [await stream.code() for stream in streams] == [grpc.StatusCode.CANCELLED] * 2

    calling(authority, own, test)


def test_tensors_are_fetched_with_a_renewed_certificate(authority, own, tmp_path):
    """The producer asks for another authority's certificates from some moment on."""
    shown, asked, second = authority.issue(NAME), tmp_path / "asked.pem", Authority(tmp_path, "second")
    shutil.copy(authority.file, asked)
    serving = Tls(shown.cert, shown.key, client_ca=asked)
    stores = [TensorStore(lease_s=60, max_bytes=1 << 20) for _ in range(2)]
    servers = [TensorServer(store, host=NAME, port=0, advertise_host=NAME, tls=serving) for store in stores]
    tensor = torch.arange(12.0)
    first, later = (server.publish(server.store.put(tensor)) for server in servers)
    resolver = TensorResolver.over_grpc(tls=own)
    fetch = functools.partial(resolver.fetch, field="tensor", max_bytes=1024)
    try:
        assert torch.equal(fetch(first), tensor)
        shutil.copy(second.file, asked)
        with pytest.raises(ReferenceLost):
            fetch(later)
        new = second.issue("caller.example.com")
        shutil.copy(new.cert, own.cert)
        shutil.copy(new.key, own.key)
        assert torch.equal(fetch(later), tensor) and torch.equal(fetch(first), tensor)
    finally:
        resolver.close()
        for server in servers:
            server.stop(0)
