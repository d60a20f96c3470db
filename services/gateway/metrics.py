"""What Prometheus scrapes. Counters and histograms of what happened; gauges are set from the table at each scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import SummaryMetricFamily
from prometheus_client.registry import Collector

from services.gateway.memory import StageDevices, device_key
from services.gateway.workers.choosing import WorkerState
from services.gateway.workers.replicas import WorkerView
from shared.memory.device_state import DeviceState
from shared.memory.modes import VramMode

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
        self._lowered = Counter(
            "ovi_mode_lowered", "Times a denoise began again in a mode that takes less memory", registry=registry
        )
        self._repeated = Counter(
            "ovi_denoise_steps_repeated",
            "Solver steps made again because a denoise was cut or its mode lowered, as far as this gateway saw",
            registry=registry,
        )
        self._devices = DeviceMetrics(registry)
        self._workers = WorkerMetrics(registry)

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

    def steps_repeated(self, number: int) -> None:
        """So many steps had been made before."""
        self._repeated.inc(number)

    def mode_was_lowered(self) -> None:
        """A denoise ran out of memory and began again in a lower mode."""
        self._lowered.inc()

    def stage_waited(self, stage: str) -> None:
        """A worker could not take a call now."""
        self._waits.labels(stage).inc()

    def render(self, jobs_by_state: Mapping[str, int]) -> bytes:
        """The text format, with the gauges as of now."""
        for state, count in jobs_by_state.items():
            self._jobs.labels(state).set(count)
        self._queue.set(jobs_by_state.get("queued", 0))
        return generate_latest(self._registry)

    @property
    def devices(self) -> DeviceMetrics:
        """Those of devices."""
        return self._devices

    @property
    def workers(self) -> WorkerMetrics:
        """Those of workers."""
        return self._workers


class WorkerMetrics(Collector):
    """The workers of the stages, set from what is known of them at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._number = Gauge(
            "ovi_workers", "Workers that this gateway knows, by state", ["stage", "state"], registry=registry
        )
        self._pending = Gauge(
            "ovi_worker_pending",
            "Calls that wait or are under way at a worker",
            ["stage", "address"],
            registry=registry,
        )
        self._views: Sequence[WorkerView] = ()
        registry.register(self)

    def collect(self) -> Iterator[SummaryMetricFamily]:
        """How long cancelled work held the device, as the workers count it themselves."""
        cancels = SummaryMetricFamily(
            "ovi_cancel_latency_seconds",
            "Seconds from the cancel of a call at a worker until its device was free",
            labels=["stage", "address"],
        )
        for view in self._views:
            if view.report is not None:
                cancels.add_metric([view.stage, view.address], view.report.num_cut, view.report.cut_s)
        yield cancels

    def show(self, views: Sequence[WorkerView]) -> None:
        """All of them, as they are now."""
        self._views = views
        for gauge in (self._number, self._pending):
            gauge.clear()
        for stage in sorted({view.stage for view in views}):
            for state in WorkerState:
                number = sum(view.state is state for view in views if view.stage == stage)
                self._number.labels(stage, state.value).set(number)
        for view in views:
            self._pending.labels(view.stage, view.address).set(view.num_pending)


class DeviceMetrics:
    """Memory and use of every device, set from the last look at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        device = ["device", "model"]
        self._memory = Gauge(
            "ovi_device_memory_bytes",
            "Memory of a device: total, free, used, of that by others",
            [*device, "kind"],
            registry=registry,
        )
        self._own = Gauge(
            "ovi_device_reserved_bytes",
            "Memory of a device that a stage has reserved",
            [*device, "stage"],
            registry=registry,
        )
        self._utilization = Gauge("ovi_device_utilization", "Busy part of a device, 0 to 1", device, registry=registry)
        self._warnings = Counter("ovi_device_warnings", "Times a device was found nearly full", registry=registry)
        self._mode = Gauge("ovi_vram_mode", "1 for the present use of device memory", ["mode"], registry=registry)
        self._num_warnings = 0

    def show(
        self, devices: Mapping[str, DeviceState], answers: Sequence[StageDevices], *, num_warnings: int, mode: VramMode
    ) -> None:
        """
        Args:
            devices: of the whole stack, by key.
            answers: the same, stage by stage.
            num_warnings: so far.
            mode: of the fusion service; AUTO: not known.
        """
        for gauge in (self._memory, self._own, self._utilization, self._mode):
            gauge.clear()
        for key, device in devices.items():
            used = device.total_bytes - device.free_bytes
            kinds = {
                "total": device.total_bytes,
                "free": device.free_bytes,
                "used": used,
                "others": device.others_bytes,
            }
            for kind, size in kinds.items():
                self._memory.labels(key, device.model, kind).set(size)
            if device.utilization is not None:
                self._utilization.labels(key, device.model).set(device.utilization)
        for answer in answers:
            for device in answer.devices:
                key = device_key(answer.host, device)
                self._own.labels(key, device.model, answer.stage).set(device.own_bytes)
        self._warnings.inc(num_warnings - self._num_warnings)
        self._num_warnings = num_warnings
        if mode is not VramMode.AUTO:
            self._mode.labels(mode.value).set(1)
