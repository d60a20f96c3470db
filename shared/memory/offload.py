"""Tensors that are on a device for good, or in host memory and on the device for a turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from shared.memory.host import HostBuffer
from shared.memory.streaming import HostUnit


class Component:
    """Tensors that are computed with together. Who holds them sees where they are: each keeps its identity.

    All methods are called on the device's thread.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """
        Args:
            tensors: by name, on `device`; parameters and buffers of modules, or any others.
            device: where they are computed with.
        """
        self._tensors = dict(tensors)
        self._device = device
        self._host: HostUnit | None = None

    @property
    def hosted(self) -> bool:
        """True if the values are in host memory, and on the device within `present` only."""
        return self._host is not None

    def to_host(self) -> None:
        """Keep the values in host memory from now on, pinned if the device is a GPU.

        Raises:
            OutOfMemory: the host's memory cannot be had or locked.
        """
        if self._host is None:
            self._host = HostUnit(self._tensors, HostBuffer(self._tensors, pin=self._device.type == "cuda"))
            self._leave(self._host)

    def to_device(self) -> None:
        """Keep them on the device from now on, and give the host's memory back."""
        if self._host is not None:
            self._enter(self._host)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._host.values.close()
            self._host = None

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Have the values on the device within; one at a time. What they took there is free afterwards."""
        if self._host is None:
            yield
            return
        self._enter(self._host)
        try:
            yield
        finally:
            self._leave(self._host)

    def _enter(self, host: HostUnit) -> None:
        # Not under inference mode, whatever the caller does: parameters shall be views of it.
        with torch.inference_mode(False):
            memory = torch.empty(host.values.num_bytes, dtype=torch.uint8, device=self._device)
            memory.copy_(host.values.bytes, non_blocking=True)
            host.point_to(host.values.views(memory))

    @staticmethod
    def _leave(host: HostUnit) -> None:
        with torch.inference_mode(False):
            host.point_to(host.values.views(host.values.bytes))
