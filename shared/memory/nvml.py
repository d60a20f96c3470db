"""The driver's view of NVIDIA GPUs, through NVML (nvidia-ml-py). Makes no context on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

_INTEGRATED = frozenset({"5.3", "6.2", "7.2", "8.7", "10.1", "11.0", "12.1"})
"""Compute capabilities of GPUs that only come with memory shared with the host: Jetson, Drive, DGX Spark."""
_NVLINK = "NVLink"


class NvmlLost(Exception):
    """NVML is not there, or failed where it must not."""


@dataclass(frozen=True)
class Gpu:
    """What does not change of a GPU."""

    handle: Any
    model: str
    uuid: str
    capability: str
    links: tuple[str, ...] = ()

    @property
    def integrated(self) -> bool:
        """Whether it shares the host's memory."""
        return self.capability in _INTEGRATED


@dataclass(frozen=True)
class GpuMemory:
    """Of a GPU with memory of its own. What driver and firmware keep for themselves is no part of it."""

    free_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class GpuNow:
    """What changes."""

    memory: GpuMemory | None
    """None for a GPU that shares the host's."""
    utilization: float | None
    """0 to 1; None where the driver does not tell."""
    bytes_by_pid: Mapping[int, int]
    """Of processes whose use the driver tells; in a container the numbers may be those of another namespace."""


class Nvml:
    """All GPUs of this host."""

    def __init__(self, library: Any) -> None:
        """
        Args:
            library: `pynvml`, or what answers like it.

        Raises:
            NvmlLost: no library, no driver, or one that refuses.
        """
        self._library = library
        self._gpus = self._must(self._read_all)

    def visible(self, environment: Mapping[str, str]) -> list[Gpu | None] | None:
        """The GPUs in CUDA's order; None where only CUDA itself can tell it.

        That is for parts of a GPU (MIG), and for cards that differ: CUDA then puts what it takes for the fastest first,
        unless told CUDA_DEVICE_ORDER=PCI_BUS_ID, which is NVML's order.
        """
        alike = len({gpu.model for gpu in self._gpus}) <= 1
        if not alike and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            return None
        text = environment.get("CUDA_VISIBLE_DEVICES")
        if text is None:
            return list(self._gpus)
        chosen: list[Gpu | None] = []
        for entry in (part.strip() for part in text.split(",")):
            if entry.startswith("MIG-"):
                return None
            if entry.isdecimal():
                found = self._gpus[int(entry) :][:1]
            else:
                found = [gpu for gpu in self._gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
            if len(found) != 1:
                # CUDA, too, stops at the first that it cannot make out.
                break
            chosen.extend(found)
        return chosen

    def find(self, uuid: str) -> Gpu | None:
        """The GPU of a uuid; None if there is none."""
        return next((gpu for gpu in self._gpus if gpu.uuid == uuid), None)

    def linked(self, gpus: Sequence[Gpu | None]) -> list[Gpu | None]:
        """The same GPUs, with what links each to the others; these are named by their place in the list."""
        linked = []
        for gpu in gpus:
            links = []
            for index, peer in enumerate(gpus):
                if gpu is not None and peer is not None and peer is not gpu:
                    link = self._optional(self._link, gpu.handle, peer.handle)
                    links += [f"cuda:{index} {link}"] if link else []
            linked.append(replace(gpu, links=tuple(links)) if gpu is not None else None)
        return linked

    def now(self, gpu: Gpu) -> GpuNow:
        """What changes of a GPU.

        Raises:
            NvmlLost: the driver stopped, or the GPU fell off the bus.
        """
        library = self._library
        use = self._optional(library.nvmlDeviceGetUtilizationRates, gpu.handle)
        processes = self._optional(library.nvmlDeviceGetComputeRunningProcesses_v3, gpu.handle) or []
        return GpuNow(
            memory=self._must(self._memory, gpu.handle),
            utilization=use.gpu / 100 if use is not None else None,
            bytes_by_pid={process.pid: process.usedGpuMemory for process in processes if process.usedGpuMemory},
        )

    def _memory(self, handle: Any) -> GpuMemory | None:
        library = self._library
        try:
            memory = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
        except library.NVMLError as error:
            if error.value != library.NVML_ERROR_NOT_SUPPORTED:
                raise
            return None
        return GpuMemory(memory.free, memory.used)

    def _read_all(self) -> list[Gpu]:
        library = self._library
        library.nvmlInit()
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        return [
            Gpu(
                handle=handle,
                model=library.nvmlDeviceGetName(handle),
                uuid=library.nvmlDeviceGetUUID(handle),
                capability="{}.{}".format(*library.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        ]

    def _link(self, here: Any, there: Any) -> str:
        library = self._library
        status = self._optional(library.nvmlDeviceGetP2PStatus, here, there, library.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == library.NVML_P2P_STATUS_OK:
            return _NVLINK
        level = library.nvmlDeviceGetTopologyCommonAncestor(here, there)
        if level <= library.NVML_TOPOLOGY_MULTIPLE:
            return "PCIe switch"
        return "PCIe across sockets" if level >= library.NVML_TOPOLOGY_SYSTEM else "PCIe"

    def _must(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            raise NvmlLost(str(error)) from None

    def _optional(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """What the driver tells; None where it does not."""
        try:
            return call(*arguments)
        except self._library.NVMLError:
            return None
