"""What the gateway's benchmarks measure alike: spreads of times, and what its process takes of the machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Self

import psutil

from tests.grpc.gateway_client import GatewayUnderTest

NO_LIMITS = ("--max-watches", "0", "--requests-per-minute", "0", "--address-requests-per-minute", "0")
"""Flags of a gateway that many calls from one address are made of."""


@dataclass(frozen=True)
class Spread:
    """Of milliseconds."""

    number: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, taken_ms: list[float]) -> Self:
        """Of at least one."""
        ordered = sorted(taken_ms)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        return cls(len(ordered), *(round(value, 2) for value in (statistics.median(ordered), p99, ordered[-1])))


@dataclass(frozen=True)
class Footprint:
    """What a gateway's process holds."""

    resident_mib: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, gateway: GatewayUnderTest) -> Self:
        """Now."""
        process = psutil.Process(gateway.service.process.pid)
        with process.oneshot():
            return cls(round(process.memory_info().rss / 2**20, 1), process.num_fds(), process.num_threads())


def processor_s(gateway: GatewayUnderTest) -> float:
    """Seconds of a core that a gateway's process has taken so far."""
    times = psutil.Process(gateway.service.process.pid).cpu_times()
    return times.user + times.system


def core_percent(gateway: GatewayUnderTest, for_s: float) -> float:
    """Part of a core that a gateway takes while nobody asks it for anything."""
    before_s, begun_s = processor_s(gateway), time.perf_counter()
    time.sleep(for_s)
    return round(100 * (processor_s(gateway) - before_s) / (time.perf_counter() - begun_s), 1)
