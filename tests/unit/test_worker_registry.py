"""Where workers are: registrations with leases, and names that are looked up."""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from services.gateway.workers.choosing import Report, WorkerState
from services.gateway.workers.directory import Directory
from services.gateway.workers.registry import MAX_REGISTERED, Registry
from services.gateway.workers.replicas import Replicas, WorkerCut
from shared.errors import FailedPrecondition, InvalidRequest, PermissionDenied, ResourceExhausted, Unavailable
from shared.places import Name, Place, look_up
from shared.registration import Registration, add_registration_flags, registration_of
from shared.tensors.transport import TensorResolver
from shared.tls import add_tls_flags

WAIT_S = 20.0


class Worker:
    """A client whose worker tells what a test says."""

    answers: dict[str, Report | Exception]

    def __init__(self, place: Place) -> None:
        self.address = place.address

    async def close(self) -> None:
        pass

    async def report(self) -> Report:
        answer = self.answers.get(self.address, Report("fusion"))
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def pools() -> dict[str, Replicas[Worker]]:
    Worker.answers = {}
    return {stage: Replicas(stage, Worker) for stage in ("fusion", "vae")}


@pytest.fixture
def now_s() -> list[float]:
    return [1000.0]


@pytest.fixture
def registry(pools, now_s) -> Registry:
    resolver = TensorResolver.over_grpc({"127.0.0.1", "*.workers", "10.0.0.7"})
    return Registry(pools, ["fusion"], resolver.accepts, lease_s=15, clock=lambda: now_s[0])


def addresses(pool: Replicas[Worker]) -> list[str]:
    return [worker.address for worker in pool.workers]


def in_loop(work: Callable[[], None]) -> None:
    """Workers that go are closed by tasks."""

    async def run() -> None:
        work()

    asyncio.run(run())


def test_a_registration_lasts_while_it_is_renewed(registry, pools, now_s):
    def work() -> None:
        assert registry.register("fusion", "a.workers:1", caller_address="10.0.0.1") == 15
        (client,) = pools["fusion"].workers
        registry.register("fusion", "b.workers:1", caller_address="10.0.0.2")
        now_s[0] += 10
        registry.register("fusion", "a.workers:1", caller_address="10.0.0.1")
        now_s[0] += 10
        registry.expire()
        assert pools["fusion"].workers == (client,), "the other did not renew it; this one is the same as before"
        registry.unregister("fusion", "a.workers:1")
        registry.unregister("fusion", "never.workers:1")
        assert not pools["fusion"].workers

    in_loop(work)


@pytest.mark.parametrize(
    ("stage", "address", "caller", "error", "words"),
    [
        ("decoder", "a.workers:1", "10.0.0.1", InvalidRequest, "stage: got 'decoder', allowed is one of"),
        ("vae", "a.workers:1", "10.0.0.1", FailedPrecondition, "start it with --vae registered"),
        ("fusion", "a.workers", "10.0.0.1", InvalidRequest, "address: got 'a.workers', allowed is host:port"),
        ("fusion", "a.workers:0", "10.0.0.1", InvalidRequest, "allowed is host:port"),
        ("fusion", "u@a.workers:1", "10.0.0.1", InvalidRequest, "allowed is host:port"),
        ("fusion", "a.workers/x:1", "10.0.0.1", InvalidRequest, "allowed is host:port"),
        ("fusion", "dns:///a.workers:1", "10.0.0.1", InvalidRequest, "allowed is host:port"),
        ("fusion", "a.elsewhere:1", "10.0.0.1", InvalidRequest, "got the host 'a.elsewhere', allowed are those of"),
        ("fusion", "10.0.0.8:1", "10.0.0.8", InvalidRequest, "allowed are those of --producer-hosts"),
        ("fusion", "127.0.0.1:22", "10.0.0.7", InvalidRequest, "give the worker --advertise-host"),
    ],
)
def test_no_registration_makes_the_gateway_call_whom_nobody_named(
    registry, pools, stage, address, caller, error, words
):
    with pytest.raises(error) as refused:
        registry.register(stage, address, caller_address=caller)
    assert words in str(refused.value)
    assert not any(pool.workers for pool in pools.values())


def test_loopback_is_for_workers_of_this_machine(registry, pools):
    registry.register("fusion", "127.0.0.1:1", caller_address="127.0.0.1")
    registry.register("fusion", "10.0.0.7:1", caller_address="10.0.0.9")
    assert addresses(pools["fusion"]) == ["127.0.0.1:1", "10.0.0.7:1"]


def test_registrations_are_bounded_and_those_that_ended_make_room(registry, pools, now_s):
    def work() -> None:
        for port in range(1, MAX_REGISTERED + 1):
            registry.register("fusion", f"a.workers:{port}", caller_address="10.0.0.1")
        registry.register("fusion", "a.workers:1", caller_address="10.0.0.1")
        with pytest.raises(ResourceExhausted, match="256 workers"):
            registry.register("fusion", "b.workers:1", caller_address="10.0.0.1")
        now_s[0] += 16
        registry.register("fusion", "b.workers:1", caller_address="10.0.0.1")
        assert addresses(pools["fusion"]) == ["b.workers:1"]

    in_loop(work)


def test_a_registration_belongs_to_its_key(registry, pools, now_s):
    def work() -> None:
        registry.register("fusion", "a.workers:1", caller_address="10.0.0.1", key_id="key_a")
        for take in (
            lambda: registry.register("fusion", "a.workers:1", caller_address="10.0.0.1", key_id="key_b"),
            lambda: registry.unregister("fusion", "a.workers:1", key_id="key_b"),
        ):
            with pytest.raises(PermissionDenied):
                take()
        now_s[0] += 16
        registry.register("fusion", "a.workers:1", caller_address="10.0.0.1", key_id="key_b")

    in_loop(work)


NAME = Name("fusion", 50052)


class Names:
    """A resolver; every lookup is awaited by a test."""

    def __init__(self) -> None:
        self.found: tuple[Place, ...] | Exception = ()
        self.lookups = asyncio.Semaphore(0)

    async def look_up(self, name: Name) -> tuple[Place, ...]:
        assert name == NAME
        self.lookups.release()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    async def seen(self) -> None:
        """Until what is found now has had its effect: the lookup after the next one has begun."""
        while not self.lookups.locked():
            await self.lookups.acquire()
        for _ in range(2):
            await asyncio.wait_for(self.lookups.acquire(), WAIT_S)


def test_workers_of_a_name_come_and_go(pools, registry):
    async def run() -> None:
        names, pool = Names(), pools["fusion"]
        first, second = Place("10.0.0.1:50052", "fusion"), Place("10.0.0.2:50052", "fusion")
        names.found = (first,)
        directory = Directory(pools, {"fusion": [Place("g:1"), NAME]}, registry, lookup=names.look_up, lookup_s=0.01)
        assert addresses(pool) == ["g:1"]
        await directory.start()
        assert addresses(pool) == ["g:1", first.address], "known before the first job"
        client = pool.workers[1]
        names.found = (first, second)
        await names.seen()
        assert addresses(pool) == ["g:1", first.address, second.address] and pool.workers[1] is client
        names.found = Unavailable("no name server answers")
        await names.seen()
        assert addresses(pool) == ["g:1", first.address, second.address], "nobody said that they are gone"
        names.found = (second,)
        await names.seen()
        assert addresses(pool) == ["g:1", second.address]
        names.found = ()
        await names.seen()
        assert addresses(pool) == ["g:1"]
        await directory.stop()

    asyncio.run(run())


def test_every_worker_is_asked_how_it_is(pools, registry):
    async def until(reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not reached():
                await asyncio.sleep(0.01)

    async def run() -> None:
        pool = pools["fusion"]
        Worker.answers = {
            "a:1": Report("fusion", num_pending=4),
            "b:1": WorkerCut("refused"),
            "c:1": Unavailable("draining"),
        }
        given = [Place(address) for address in Worker.answers]
        directory = Directory(pools, {"fusion": given}, registry)
        await directory.start()
        known = [WorkerState.SERVING, WorkerState.UNREACHABLE, WorkerState.NOT_SERVING]
        await until(lambda: [view.state for view in pool.views()] == known)
        assert [view.num_pending for view in pool.views()] == [4, 0, 0]
        Worker.answers = {}
        await until(lambda: pool.num_up == 3)
        await directory.stop()

    asyncio.run(run())


def test_names_are_looked_up_by_this_system(monkeypatch):
    found = asyncio.run(look_up(Name("localhost", 50052)))
    assert Place("127.0.0.1:50052", "localhost") in found and len(set(found)) == len(found)

    def answering(error: int) -> Callable[..., None]:
        def answer(*_: object, **__: object) -> None:
            raise socket.gaierror(error, "as it says")

        return answer

    monkeypatch.setattr(socket, "getaddrinfo", answering(socket.EAI_NONAME))
    assert asyncio.run(look_up(NAME)) == (), "a Service without pods"
    monkeypatch.setattr(socket, "getaddrinfo", answering(socket.EAI_AGAIN))
    with pytest.raises(Unavailable, match="dns:///fusion:50052 cannot be looked up"):
        asyncio.run(look_up(NAME))


def parsed(*flags: str) -> Registration | None:
    parser = argparse.ArgumentParser()
    add_tls_flags(parser)
    add_registration_flags(parser)
    return registration_of(parser.parse_args(flags))


def test_a_worker_registers_nowhere_unless_told_to():
    assert parsed() is None
    found = parsed("--gateway", "127.0.0.1:50050,dns:///gateway-pods:50050")
    assert found is not None and found.gateways == (Place("127.0.0.1:50050"), Name("gateway-pods", 50050))
    assert found.key() == ""


def test_a_key_does_not_travel_readable(tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("ovi_secret\n")
    flags = ["--gateway-key-file", str(key)]
    with pytest.raises(ValueError, match=r"--gateway gateway: without TLS everybody on the way could read the API key"):
        parsed("--gateway", "gateway:50050", *flags)
    for allowed in (["--gateway", "127.0.0.1:50050"], ["--gateway", "dns:///gateway:50050", "--insecure"]):
        found = parsed(*allowed, *flags)
        assert found is not None and found.key() == "ovi_secret" and "secret" not in repr(found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gateway", "gateway"], "--gateway: got 'gateway', allowed is host:port"),
        (["--gateway-key-file", "x"], "--gateway-key-file and --gateway-tls-ca need --gateway"),
        (["--gateway", "g:1", "--gateway-key-file", "/nowhere/key"], "--gateway-key-file /nowhere/key: cannot be read"),
        (["--gateway", "g:1", "--gateway-key-file", "/dev/null"], "--gateway-key-file /dev/null: holds no API key"),
        (["--gateway", "g:1", "--gateway-tls-ca", "/nowhere/ca"], "--gateway-tls-ca /nowhere/ca: cannot be read"),
    ],
)
def test_flags_that_cannot_be_used_are_named(flags, words):
    with pytest.raises(ValueError, match=words):
        parsed(*flags)
