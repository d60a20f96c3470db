"""A worker's side of its registration, with gateways that note what they are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from shared.places import Name, Place
from shared.registration import Announcer, Registration
from shared.tls import PLAIN, Tls, add_secure_port, open_channel
from tests.certificates import Authority

WAIT_S = 20.0


class Gateway(pb_grpc.WorkerServiceServicer):
    """Gives short leases."""

    lease_s = 0.3

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()
        """Call, address, credentials."""
        self.refuses = False
        self.port = 0

    async def RegisterWorker(self, request, context):
        if self.refuses:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
        self._note("register", request, context)
        return pb.RegisterWorkerResponse(lease_seconds=self.lease_s)

    async def UnregisterWorker(self, request, context):
        self._note("unregister", request, context)
        return pb.UnregisterWorkerResponse()

    def _note(self, what, request, context) -> None:
        key = dict(context.invocation_metadata()).get("authorization", "")
        self.told.put_nowait((what, f"{request.stage} {request.address}", key))

    async def hears(self) -> tuple[str, str, str]:
        return await asyncio.wait_for(self.told.get(), WAIT_S)

    async def hears_of_the_end(self) -> None:
        while (await self.hears())[0] != "unregister":
            pass


@contextlib.asynccontextmanager
async def serving(tls: Tls = PLAIN) -> AsyncIterator[Gateway]:
    gateway, server = Gateway(), grpc.aio.server()
    pb_grpc.add_WorkerServiceServicer_to_server(gateway, server)
    gateway.port = add_secure_port(server, "127.0.0.1", 0, tls)
    await server.start()
    try:
        yield gateway
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def announcing(announcer: Announcer) -> AsyncIterator[None]:
    task = asyncio.create_task(announcer.run(50052))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=WAIT_S)
        assert task.cancelled()


def test_every_gateway_is_told_again_and_again_and_of_the_end(tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("ovi_key\n")

    async def run() -> None:
        async with serving() as first, serving() as second:
            places = (Place(f"127.0.0.1:{first.port}"), Place(f"127.0.0.1:{second.port}"))
            async with announcing(Announcer("fusion", "gpu-1", Registration(places, PLAIN, key))):
                for gateway in (first, second):
                    for _ in range(3):
                        assert await gateway.hears() == ("register", "fusion gpu-1:50052", "Bearer ovi_key")
            for gateway in (first, second):
                await gateway.hears_of_the_end()

    asyncio.run(run())


def test_a_gateway_that_refuses_or_is_away_is_asked_again_and_holds_up_no_other(monkeypatch):
    monkeypatch.setattr("shared.registration._RETRY_S", 0.05)

    async def run() -> None:
        async with serving() as good, serving() as loading:
            loading.refuses = True
            places = tuple(Place(f"127.0.0.1:{port}") for port in (good.port, loading.port, 1))
            async with announcing(Announcer("vae", "gpu-1", Registration(places, PLAIN))):
                assert await good.hears() == ("register", "vae gpu-1:50052", "")
                await good.hears()
                loading.refuses = False
                assert (await loading.hears())[0] == "register"

    asyncio.run(run())


def test_gateways_behind_a_name_are_found_as_they_come():
    async def run() -> None:
        async with serving() as first, serving() as second:
            found = [Place(f"127.0.0.1:{first.port}", "gateways")]

            async def look_up(name: Name) -> tuple[Place, ...]:
                assert name == Name("gateways", 50050)
                return tuple(found)

            registration = Registration((Name("gateways", 50050),), PLAIN)
            async with announcing(Announcer("fusion", "gpu-1", registration, look_up)):
                await first.hears()
                found.append(Place(f"127.0.0.1:{second.port}", "gateways"))
                await second.hears()
                del found[0]
                await second.hears()
            await second.hears_of_the_end()
            assert "unregister" not in [first.told.get_nowait()[0] for _ in range(first.told.qsize())]

    asyncio.run(run())


def test_a_certificate_is_for_the_name_that_was_looked_up(tmp_path: Path):
    authority = Authority(tmp_path, "right")
    pair = authority.issue("gateways.internal")

    async def run() -> None:
        async with serving(Tls(pair.cert, pair.key)) as gateway:
            tls = Tls(ca=authority.file)
            place = Place(f"127.0.0.1:{gateway.port}", "gateways.internal")
            async with announcing(Announcer("fusion", "gpu-1", Registration((place,), tls))):
                assert (await gateway.hears())[0] == "register"
            async with open_channel(place.address, tls) as channel:
                request = pb.RegisterWorkerRequest(stage="fusion", address="gpu-1:1")
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await pb_grpc.WorkerServiceStub(channel).RegisterWorker(request, timeout=WAIT_S)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, "it is for no address"

    asyncio.run(run())
