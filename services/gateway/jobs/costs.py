"""How long jobs take, learned from those that ended; when a job that waits will begin and end. Pure.

A class of jobs has the same model, size, memory mode and kind; denoising is counted by the step, since jobs differ in
steps only by what they ask for. The stage that takes longest is what jobs wait for; each of its workers is a lane.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.gateway.jobs.domain import ClipParameters, Estimate, Job, JobStage, JobState

_KEPT = 33
"""Last jobs of a class that its medians are made of."""
_DENOISE = JobStage.DENOISE.value


def cost_class(parameters: ClipParameters) -> str:
    """What a job's duration depends on, in one word: model, size, frames, steps, guidance, mode, picture."""
    options = parameters.options
    passes = 2 if options.needs_negative_pass else 1
    kind = "i2v" if parameters.image_id else "t2v"
    size = f"{parameters.height}x{parameters.width}x{parameters.num_frames}"
    cached = f"{options.step_cache_threshold:g}"
    mode = parameters.vram_mode.value
    return f"{parameters.model}/{size}/{kind}/{mode}/{passes}p/{cached}/{options.num_inference_steps}"


@dataclass(frozen=True)
class Cost:
    """Median seconds of each stage of one job of a class."""

    stage_seconds: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """Of all stages."""
        return sum(self.stage_seconds.values())

    @property
    def bottleneck_s(self) -> float:
        """Of the longest stage: jobs behind wait for it."""
        return max(self.stage_seconds.values(), default=0.0)


class CostModel:
    """Medians of the stages of finished jobs, class by class."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[Mapping[str, float]]] = {}
        self._medians: dict[str, dict[str, float]] = {}

    def learn(self, cost_class: str, stage_seconds: Mapping[str, float]) -> None:
        """A job of a class ended; seconds of its stages."""
        if stage_seconds:
            kind, steps = _split(cost_class)
            unit = {stage: s / steps if stage == _DENOISE else s for stage, s in stage_seconds.items()}
            self._seen.setdefault(kind, deque(maxlen=_KEPT)).append(unit)
            self._medians.pop(kind, None)

    def cost(self, cost_class: str) -> Cost | None:
        """What a job of a class takes; None if none of its kind has ended yet."""
        kind, steps = _split(cost_class)
        seen = self._seen.get(kind)
        if not seen:
            return None
        medians = self._medians.get(kind)
        if medians is None:
            stages = dict.fromkeys(stage for job in seen for stage in job)
            medians = {stage: statistics.median(job[stage] for job in seen if stage in job) for stage in stages}
            self._medians[kind] = medians
        return Cost({stage: s * steps if stage == _DENOISE else s for stage, s in medians.items()})

    def mean_bottleneck_s(self, num_by_class: Mapping[str, int]) -> float | None:
        """What one of these jobs keeps the longest stage busy, on average; None if nothing is known of any of them."""
        known = [(cost.bottleneck_s, number) for name, number in num_by_class.items() if (cost := self.cost(name))]
        total = sum(number for _, number in known)
        return sum(seconds * number for seconds, number in known) / total if total else None


def _split(cost_class: str) -> tuple[str, int]:
    kind, _, steps = cost_class.rpartition("/")
    return kind, int(steps or 1)


def remaining_s(job: Job, cost: Cost) -> float:
    """Seconds that a running job still takes."""
    left = 0.0
    for stage, seconds in cost.stage_seconds.items():
        if stage == job.progress.stage.value:
            done = min(1.0, job.progress.done / job.progress.total) if job.progress.total else 0.5
            left += seconds * (1.0 - done)
        elif stage not in job.stage_seconds:
            left += seconds
    return left


@dataclass(frozen=True)
class Load:
    """What is before a job that waits."""

    under_way_s: float
    """What running jobs still keep the longest stage busy."""
    each_s: float | None
    """What a job that waits keeps it busy, on average; None: nothing is known of any of them."""
    lanes: int
    """Workers of the longest stage, at least 1."""

    @classmethod
    def of(cls, running: Iterable[Job], num_by_class: Mapping[str, int], lanes: int, model: CostModel) -> Load:
        """The load of running jobs and, by cost class, of those that wait."""
        under_way_s = 0.0
        for job in running:
            cost = model.cost(cost_class(job.parameters))
            if cost is not None:
                under_way_s += min(cost.bottleneck_s, remaining_s(job, cost))
        return cls(under_way_s, model.mean_bottleneck_s(num_by_class), lanes)


def estimate(job: Job, position: int, load: Load, model: CostModel, now_s: float) -> Estimate:
    """When a job that waits or runs gets on.

    Args:
        job: QUEUED or RUNNING.
        position: jobs that are begun before it.
        load: what else there is.
        model: of costs.
        now_s: Unix seconds.
    """
    cost = model.cost(cost_class(job.parameters))
    if job.state is JobState.RUNNING:
        end_s = now_s + remaining_s(job, cost) if cost is not None else None
        return Estimate(0, job.start_time_s, end_s)
    if cost is None or load.each_s is None:
        return Estimate(position, None, None)
    start_s = now_s + (load.under_way_s + position * load.each_s) / load.lanes
    return Estimate(position, start_s, start_s + cost.total_s)
