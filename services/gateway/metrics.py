"""What Prometheus scrapes. Counters and histograms of what happened; gauges are set from the table at each scrape."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STAGE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)
_STEP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class GatewayMetrics:
    """The gateway's metrics in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._jobs = Gauge("ovi_jobs", "Jobs kept, by state", ["state"], registry=registry)
        self._queue = Gauge("ovi_queue_length", "Jobs waiting for their turn", registry=registry)
        self._created = Counter("ovi_jobs_created", "Jobs accepted", registry=registry)
        self._ended = Counter("ovi_jobs_ended", "Jobs ended, by state", ["state"], registry=registry)
        self._stages = Histogram(
            "ovi_stage_seconds", "Seconds a finished stage took", ["stage"], buckets=_STAGE_BUCKETS_S, registry=registry
        )
        self._steps = Histogram(
            "ovi_denoise_step_seconds", "Seconds a solver step took", buckets=_STEP_BUCKETS_S, registry=registry
        )
        self._waits = Counter(
            "ovi_stage_waits", "Times a stage's worker was not available or full", ["stage"], registry=registry
        )

    def job_created(self) -> None:
        """A job was accepted."""
        self._created.inc()

    def job_ended(self, state: str) -> None:
        """A job ended in `state`."""
        self._ended.labels(state).inc()

    def stage_finished(self, stage: str, seconds: float) -> None:
        """A stage was finished."""
        self._stages.labels(stage).observe(seconds)

    def step_finished(self, seconds: float) -> None:
        """A solver step was finished."""
        self._steps.observe(seconds)

    def stage_waited(self, stage: str) -> None:
        """A worker could not take a call now."""
        self._waits.labels(stage).inc()

    def render(self, jobs_by_state: Mapping[str, int]) -> bytes:
        """The text format, with the gauges as of now."""
        for state, count in jobs_by_state.items():
            self._jobs.labels(state).set(count)
        self._queue.set(jobs_by_state.get("queued", 0))
        return generate_latest(self._registry)
