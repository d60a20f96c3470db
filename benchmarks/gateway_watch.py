"""How soon many watchers hear of a step, over server-sent events and gRPC at once; what a gateway takes while idle.

The stages are scripted: the job makes a step each time all watchers have heard of the one before. Times are from the
moment at which the stage sends the step to the moment at which a watcher has read it; the watchers share one process,
which takes its part of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import httpx

from benchmarks.gateway_measures import NO_LIMITS, Footprint, Spread, core_percent
from benchmarks.gateway_queue import fill
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import scripted_stages

_STREAMS_A_CHANNEL = 100
_OPENING_AT_ONCE = 50
_HEARD_S = 60.0
_UNDER_WAY = 3
"""Jobs that a gateway works on at once, unless told otherwise."""


@dataclass(frozen=True)
class WatchRow:
    """A step told to all watchers of one job, several times."""

    sse: int
    """Open event streams."""
    grpc: int
    """Open WatchJob calls beside them."""
    steps: int
    opened_s: float
    """Until all of them were open and had heard where the job is."""
    over_sse: Spread
    over_grpc: Spread
    footprint: Footprint


@dataclass(frozen=True)
class IdleRow:
    """A gateway that nobody asks for anything."""

    state: str
    core_percent: float
    """Of one core."""
    footprint: Footprint


class _Audience:
    """When each watcher heard of each step."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._heard: dict[int, list[float]] = {}
        self._complete = asyncio.Condition()

    async def hear(self, step: int) -> None:
        """A watcher was told that so many steps are done."""
        moments = self._heard.setdefault(step, [])
        moments.append(time.perf_counter())
        if len(moments) == self.number:
            async with self._complete:
                self._complete.notify_all()

    async def all_heard(self, step: int) -> list[float]:
        """The moments, once every watcher was told."""
        async with self._complete:
            await asyncio.wait_for(
                self._complete.wait_for(lambda: len(self._heard.get(step, ())) == self.number), _HEARD_S
            )
        return self._heard[step]


async def _tell(audience: _Audience, dones: AsyncIterator[int]) -> None:
    """Pass on what one watcher is told, each number of steps once."""
    last = -1
    async for done in dones:
        if done > last:
            last = done
            await audience.hear(done)


async def _over_sse(client: httpx.AsyncClient, job_id: str) -> AsyncIterator[int]:
    """Steps done, as events tell."""
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])["progress"]["done"]


async def _over_grpc(channel: grpc.aio.Channel, job_id: str) -> AsyncIterator[int]:
    """Steps done, as the stream tells."""
    async for answer in pb_grpc.JobServiceStub(channel).WatchJob(pb.WatchJobRequest(id=job_id)):
        yield answer.job.progress.done


@contextlib.asynccontextmanager
async def _watching(
    gateway: GatewayUnderTest, job_id: str, sse: int, grpc_streams: int
) -> AsyncGenerator[dict[str, _Audience]]:
    """So many watchers of a job, all of which have heard where it is."""
    audiences = {"sse": _Audience(sse), "grpc": _Audience(grpc_streams)}
    apart = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(gateway.service.address, apart) for _ in range(-(-grpc_streams // _STREAMS_A_CHANNEL))
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=gateway.http_url, limits=limits, timeout=_HEARD_S) as client:
        sources = [("sse", _over_sse(client, job_id)) for _ in range(sse)]
        sources += [
            ("grpc", _over_grpc(channels[index // _STREAMS_A_CHANNEL], job_id)) for index in range(grpc_streams)
        ]
        watchers = []
        for index, (kind, dones) in enumerate(sources):
            watchers.append(asyncio.create_task(_tell(audiences[kind], dones)))
            if index % _OPENING_AT_ONCE == 0:
                await asyncio.sleep(0)
        await _all_heard(audiences, 0)
        try:
            yield audiences
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
    await asyncio.gather(*(channel.close() for channel in channels))


async def _all_heard(audiences: dict[str, _Audience], step: int) -> dict[str, list[float]]:
    return {kind: await audience.all_heard(step) for kind, audience in audiences.items() if audience.number}


def measure_watchers(sse: int, grpc_streams: int, steps: int) -> WatchRow:
    """Open all watches, then step after step."""
    with TemporaryDirectory() as name, scripted_stages() as stages:
        stages.fusion.automatic = False
        with running_gateway(Path(name), *stages.flags, *NO_LIMITS) as gateway:
            job = gateway.create(steps=steps + 1)
            call = stages.fusion.next_call()

            async def watch() -> WatchRow:
                latencies: dict[str, list[float]] = {"sse": [], "grpc": []}
                begun_s = time.perf_counter()
                async with _watching(gateway, job.id, sse, grpc_streams) as audiences:
                    opened_s = time.perf_counter() - begun_s
                    for step in range(1, steps + 1):
                        sent_s = time.perf_counter()
                        call.step()
                        for kind, moments in (await _all_heard(audiences, step)).items():
                            latencies[kind] += [(moment - sent_s) * 1e3 for moment in moments]
                    spreads = [Spread.of(latencies[kind]) for kind in ("sse", "grpc")]
                    return WatchRow(sse, grpc_streams, steps, round(opened_s, 1), *spreads, Footprint.of(gateway))

            row = asyncio.run(watch())
            gateway.cancel(job.id)
    return row


def measure_idle(watchers: int, num_queued: int, for_s: float) -> list[IdleRow]:
    """A gateway with nothing to do; with a job under way whose stage is silent and many event streams; with a queue."""
    rows = []
    with TemporaryDirectory() as name, scripted_stages() as stages:
        stages.fusion.automatic = False
        with running_gateway(Path(name), *stages.flags, *NO_LIMITS) as gateway:
            rows.append(IdleRow("no jobs", core_percent(gateway, for_s), Footprint.of(gateway)))
            job = gateway.create(steps=1)
            stages.fusion.next_call()

            async def watch() -> IdleRow:
                async with _watching(gateway, job.id, watchers, 0):
                    percent = await asyncio.to_thread(core_percent, gateway, for_s)
                    state = f"1 job under way, {watchers:,} event streams of it"
                    return IdleRow(state, percent, Footprint.of(gateway))

            rows.append(asyncio.run(watch()))
            gateway.cancel(job.id)
    with TemporaryDirectory() as name, scripted_stages() as stages:
        stages.fusion.automatic = False
        fill(Path(name), "", num_queued)
        with running_gateway(Path(name), *stages.flags) as gateway:
            for _ in range(_UNDER_WAY):
                stages.fusion.next_call()
            state = f"{num_queued:,} queued, {_UNDER_WAY} under way"
            rows.append(IdleRow(state, core_percent(gateway, for_s), Footprint.of(gateway)))
    return rows
