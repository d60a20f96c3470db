"""How soon many watchers hear of a step: server-sent events and gRPC streams of one job, all at once.

`python -m benchmarks.gateway_watch --sse 1000 --grpc 1000 [--steps 20] [--json FILE]`. The stages are scripted: the job
makes a step each time all watchers have heard of the one before. Times are from the moment at which the stage sends the
step to the moment at which a watcher has read it; the watchers share one process, which takes its part of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import psutil

from benchmarks.gateway import spread
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import DenoiseCall, scripted_stages

_STREAMS_A_CHANNEL = 100
_OPENING_AT_ONCE = 50
_HEARD_S = 60.0
_NO_LIMITS = ("--max-watches", "0", "--requests-per-minute", "0", "--address-requests-per-minute", "0")


class Audience:
    """When each watcher heard of each step."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._heard: dict[int, list[float]] = {}
        self._complete = asyncio.Condition()

    async def hear(self, step: int) -> None:
        """A watcher was told that so many steps are done."""
        moments = self._heard.setdefault(step, [])
        moments.append(time.perf_counter())
        if len(moments) == self._number:
            async with self._complete:
                self._complete.notify_all()

    async def all_heard(self, step: int) -> list[float]:
        """The moments, once every watcher was told."""
        async with self._complete:
            await asyncio.wait_for(
                self._complete.wait_for(lambda: len(self._heard.get(step, ())) == self._number), _HEARD_S
            )
        return self._heard[step]


async def tell(audience: Audience, dones: AsyncIterator[int]) -> None:
    """Pass on what one watcher is told, each number of steps once."""
    last = -1
    async for done in dones:
        if done > last:
            last = done
            await audience.hear(done)


async def over_sse(client: httpx.AsyncClient, job_id: str) -> AsyncIterator[int]:
    """Steps done, as events tell."""
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])["progress"]["done"]


async def over_grpc(channel: grpc.aio.Channel, job_id: str) -> AsyncIterator[int]:
    """Steps done, as the stream tells."""
    async for answer in pb_grpc.JobServiceStub(channel).WatchJob(pb.WatchJobRequest(id=job_id)):
        yield answer.job.progress.done


async def measure(
    gateway: GatewayUnderTest, call: DenoiseCall, job_id: str, args: argparse.Namespace
) -> dict[str, object]:
    """Open all watches, then step after step."""
    audiences = {"sse": Audience(args.sse), "grpc": Audience(args.grpc)}
    apart = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(gateway.service.address, apart) for _ in range(-(-args.grpc // _STREAMS_A_CHANNEL))
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    latencies: dict[str, list[float]] = {kind: [] for kind in audiences}
    process = psutil.Process(gateway.service.process.pid)
    async with httpx.AsyncClient(base_url=gateway.http_url, limits=limits, timeout=_HEARD_S) as client:
        sources = [("sse", over_sse(client, job_id)) for _ in range(args.sse)]
        sources += [("grpc", over_grpc(channels[index // _STREAMS_A_CHANNEL], job_id)) for index in range(args.grpc)]
        watchers = []
        begun_s = time.perf_counter()
        for index, (kind, dones) in enumerate(sources):
            watchers.append(asyncio.create_task(tell(audiences[kind], dones)))
            if index % _OPENING_AT_ONCE == 0:
                await asyncio.sleep(0)
        for audience in audiences.values():
            await audience.all_heard(0)
        opened_s = time.perf_counter() - begun_s
        for step in range(1, args.steps + 1):
            sent_s = time.perf_counter()
            call.step()
            for kind, audience in audiences.items():
                latencies[kind] += [(moment - sent_s) * 1e3 for moment in await audience.all_heard(step)]
        resident_mib = round(process.memory_info().rss / 2**20)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
    await asyncio.gather(*(channel.close() for channel in channels))
    figures: dict[str, object] = {f"step over {kind}": spread(taken) for kind, taken in latencies.items()}
    return figures | {"all_open_s": round(opened_s, 1), "resident_mib": resident_mib}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sse", type=int, default=1000, help="open event streams (default: %(default)s)")
    parser.add_argument("--grpc", type=int, default=1000, help="open WatchJob calls (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps to hear of (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, scripted_stages() as stages:
        stages.fusion.automatic = False
        with running_gateway(Path(name), *stages.flags, *_NO_LIMITS) as gateway:
            job = gateway.create(steps=args.steps + 1)
            call = stages.fusion.next_call()
            figures = asyncio.run(measure(gateway, call, job.id, args))
            gateway.cancel(job.id)
    figures |= {"sse": args.sse, "grpc": args.grpc, "steps": args.steps}
    for title, value in figures.items():
        sys.stdout.write(f"{title:16} {value}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
