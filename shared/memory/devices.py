"""Which devices this process can compute on, and what their memory holds.

The driver's library (NVML) is asked wherever it can answer: it needs no context on the device, which would cost half a
GiB. PyTorch names the devices, knows what this process has, and answers alone for ROCm and where NVML is missing.
A look at 8 GPUs takes some milliseconds, the first one some tens (the links are read once).
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import pynvml
import torch

from shared.logging import get_logger
from shared.memory.device_state import DeviceState
from shared.memory.nvml import Gpu, Nvml, NvmlLost

log = get_logger(__name__)

_SHORTEST_S = 0.2
"""Below it the times of a CPU are too coarse to tell how busy it was."""


class TorchCuda(Protocol):
    """What is asked of `torch.cuda`."""

    def device_count(self) -> int: ...

    def is_initialized(self) -> bool: ...

    def get_device_properties(self, device: int) -> Any: ...

    def mem_get_info(self, device: int) -> tuple[int, int]: ...

    def memory_reserved(self, device: int) -> int: ...


class Devices:
    """The devices of this process, GPUs in PyTorch's order, then the CPU. Thread-safe."""

    def __init__(
        self,
        *,
        nvml: Any = pynvml,
        cuda: TorchCuda = torch.cuda,
        hip: bool = torch.version.hip is not None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """
        Args:
            nvml: the driver's library, or what answers like it.
            cuda: PyTorch's side, or what answers like it.
            hip: whether PyTorch was built for ROCm.
            environment: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are read from it.
        """
        self._cuda = cuda
        self._hip = hip
        self._environment = environment
        self._nvml: Nvml | None = None
        self._gpus: list[Gpu | None] | None = None
        self._used: set[int] = set()
        """Of those that only PyTorch tells of: where this process certainly has a context."""
        self._cpu = _Cpu()
        self._lock = threading.Lock()
        if not hip and cuda.device_count() > 0:
            self._nvml = _opened(nvml)

    def look(self, *, make_contexts: bool = True) -> tuple[DeviceState, ...]:
        """The devices now. Meant to be quick: 100 ms for 8 GPUs is far too long.

        Args:
            make_contexts: whether a GPU that only PyTorch can tell of may get a context of this process for it.
                Otherwise it is left out until this process has memory there.
        """
        with self._lock:
            gpus = [self._gpu(index, make_contexts) for index in range(self._cuda.device_count())]
            return (*(gpu for gpu in gpus if gpu is not None), self._cpu.look())

    def _gpu(self, index: int, make_contexts: bool) -> DeviceState | None:
        try:
            known = self._in_order(index)
            if known is not None:
                return self._by_nvml(index, known)
        except NvmlLost as error:
            log.warning("the driver does not answer any more; devices are told without it", reason=str(error))
            self._nvml = self._gpus = None
        if self._own_bytes(index):
            self._used.add(index)
        return self._by_torch(index) if make_contexts or index in self._used else None

    def _in_order(self, index: int) -> Gpu | None:
        """NVML's view of PyTorch's device; None if it has none."""
        if self._nvml is None:
            return None
        if self._gpus is None:
            visible = self._nvml.visible(self._environment)
            if visible is None or self._cuda.is_initialized():
                visible = [self._nvml.find(_uuid(self._cuda, i, hip=False)) for i in range(self._cuda.device_count())]
            self._gpus = self._nvml.linked(visible)
        return self._gpus[index] if index < len(self._gpus) else None

    def _by_nvml(self, index: int, gpu: Gpu) -> DeviceState:
        assert self._nvml is not None
        now = self._nvml.now(gpu)
        own = self._own_bytes(index)
        memory = now.memory
        unified = gpu.integrated or memory is None
        if memory is None:
            host = psutil.virtual_memory()
            total, free = host.total, host.available
        else:
            total, free = memory.free_bytes + memory.used_bytes, memory.free_bytes
        mine = max(own, now.bytes_by_pid.get(os.getpid(), 0))
        return DeviceState(
            name=f"cuda:{index}",
            model=gpu.model,
            uuid=gpu.uuid,
            backend="cuda",
            total_bytes=total,
            free_bytes=free,
            own_bytes=own,
            others_bytes=max(0, total - free - mine),
            capability=gpu.capability,
            unified=unified,
            utilization=now.utilization,
            links=gpu.links,
        )

    def _by_torch(self, index: int) -> DeviceState:
        properties = self._cuda.get_device_properties(index)
        # Makes a context if there is none; nobody else could be asked.
        free, total = self._cuda.mem_get_info(index)
        own = self._own_bytes(index)
        return DeviceState(
            name=f"cuda:{index}",
            model=properties.name,
            uuid=_uuid(self._cuda, index, hip=self._hip),
            backend="rocm" if self._hip else "cuda",
            total_bytes=total,
            free_bytes=free,
            own_bytes=own,
            others_bytes=max(0, total - free - own),
            capability=f"{properties.major}.{properties.minor}",
            unified=bool(properties.is_integrated),
        )

    def _own_bytes(self, index: int) -> int:
        return self._cuda.memory_reserved(index) if self._cuda.is_initialized() else 0


class _Cpu:
    """The host as a device."""

    def __init__(self) -> None:
        self._model = _cpu_model()
        self._process = psutil.Process()
        self._times = psutil.cpu_times()
        self._time_s = time.monotonic()
        self._utilization: float | None = None

    def look(self) -> DeviceState:
        memory = psutil.virtual_memory()
        own = self._process.memory_info().rss
        if time.monotonic() - self._time_s >= _SHORTEST_S:
            before, self._times, self._time_s = self._times, psutil.cpu_times(), time.monotonic()
            passed = [now - then for now, then in zip(self._times, before, strict=True)]
            idle = self._times.idle - before.idle
            self._utilization = min(1.0, max(0.0, 1 - idle / sum(passed))) if sum(passed) > 0 else self._utilization
        return DeviceState(
            name="cpu",
            model=self._model,
            uuid="",
            backend="cpu",
            total_bytes=memory.total,
            free_bytes=memory.available,
            own_bytes=own,
            others_bytes=max(0, memory.total - memory.available - own),
            utilization=self._utilization,
        )


def _opened(library: Any) -> Nvml | None:
    try:
        return Nvml(library)
    except NvmlLost as error:
        log.warning("the driver cannot be asked; devices are told without use, links and others", reason=str(error))
        return None


def _uuid(cuda: TorchCuda, index: int, *, hip: bool) -> str:
    """As NVML writes it."""
    uuid = str(cuda.get_device_properties(index).uuid)
    return uuid if hip else f"GPU-{uuid}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
