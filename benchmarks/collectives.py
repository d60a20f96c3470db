"""How long a step's collectives keep a GPU, and how long they keep it from everything else, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.spans import Span, covered

_COLLECTIVE_WORDS = ("nccl", "symm_mem")


@dataclass(frozen=True)
class CollectiveTimes:
    """Seconds of a step in which collective kernels ran, and in which nothing else did."""

    total_s: float
    exposed_s: float


def measure(collectives: list[Span], others: list[Span]) -> CollectiveTimes:
    """From the kernels of a step in microseconds; collectives on several streams count once."""
    exposed = covered(collectives + others) - covered(others)
    return CollectiveTimes(covered(collectives) / 1e6, exposed / 1e6)


def profile_collectives(step: Callable[[], object]) -> CollectiveTimes:
    """Run one step under the profiler, on all ranks alike, so that none is late by it alone."""
    collectives: list[Span] = []
    others: list[Span] = []
    for event in _profiled(step).events():
        if event.device_type.name != "CUDA" or event.is_user_annotation:
            continue
        span = (event.time_range.start, event.time_range.end)
        kind = collectives if any(word in event.name.lower() for word in _COLLECTIVE_WORDS) else others
        kind.append(span)
    return measure(collectives, others)


def costliest(step: Callable[[], object], device: torch.device) -> str:
    """A table of the 25 kernels (operators on a CPU) that take the most time in a step."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    averages = _profiled(step, activity).key_averages()
    sort_by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return averages.table(sort_by=sort_by, row_limit=25, max_name_column_width=80)


def _profiled(
    step: Callable[[], object], activity: torch.profiler.ProfilerActivity = torch.profiler.ProfilerActivity.CUDA
) -> torch.profiler.profile:
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
    return profile
