"""Host memory that a device copies from at full speed: the tensors of one unit in one flat buffer."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shared.errors import OutOfMemory

ALIGNMENT_BYTES = 256
"""Of what is laid out in a buffer, as the device's own allocator aligns it."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a buffer, and how it looks at it."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor inside a buffer of bytes."""
        values = memory[self.start : self.start + self.num_bytes].view(self.dtype)
        return values.as_strided(self.shape, self.stride, values.storage_offset())


class HostBuffer:
    """Copies of tensors in one buffer of host memory, which is exactly as large as they need.

    Tensors that overlap or lie side by side in one storage do so here, too: shared memory stays shared, and rows that
    were made one matrix stay one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], pin: bool) -> None:
        """
        Args:
            tensors: by name, on any device; they are copied.
            pin: lock the memory and make it known to CUDA, so that copies need no help of the CPU.

        Raises:
            OutOfMemory: the host's memory cannot be had or locked.
        """
        self._places, self.num_bytes = _lay_out(tensors)
        self.bytes = _allocate(self.num_bytes)
        """uint8, on the CPU."""
        self._unpin: Callable[[], object] = lambda: None
        if pin and self.num_bytes:
            _register(self.bytes)
            self._unpin = finalizer = weakref.finalize(self, _unregister, self.bytes.data_ptr())
            # A process that ends gives everything back, and CUDA may be gone by then.
            finalizer.atexit = False
        for name, view in self.views(self.bytes).items():
            view.copy_(tensors[name].detach())

    def views(self, device_bytes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every tensor by name, of the same dtype, shape and strides, inside a copy of `bytes`.

        Args:
            device_bytes: uint8, at least `num_bytes` of them, on any device.
        """
        return {name: place.view(device_bytes) for name, place in self._places.items()}

    def close(self) -> None:
        """Unlock the memory; it goes with the last tensor that looks at it."""
        self._unpin()


def _lay_out(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, _Place], int]:
    """The place of each tensor, and the bytes of all."""
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items())
    places: dict[str, _Place] = {}
    storage, dtype, first, last, start, end = None, None, 0, 0, 0, 0
    for owner, begin, stop, name in spans:
        tensor = tensors[name]
        beside = begin == last and tensor.dtype is dtype
        if owner != storage or not (begin < last or beside):
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            storage, dtype, first, last = owner, tensor.dtype, begin, stop
        last = max(last, stop)
        end = start + last - first
        places[name] = _Place(start + begin - first, stop - begin, tensor.dtype, tensor.shape, tensor.stride())
    return places, end


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Address of its storage, and the first byte in it and the one after the last that it looks at."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    if not tensor.numel():
        return tensor.untyped_storage().data_ptr(), begin, begin
    reach = sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), begin, begin + (reach + 1) * tensor.itemsize


def _allocate(num_bytes: int) -> torch.Tensor:
    """Whole pages of their own: torch's pinned memory comes in powers of two, and others' must not be locked."""
    try:
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise OutOfMemory(f"{num_bytes / 2**30:.2f} GiB of host memory cannot be had ({error})") from None
    with contextlib.suppress(OSError):
        # Fewer pages are locked faster; a kernel that has only small ones does without.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def _register(memory: torch.Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
    if int(code) != 0:
        # CUDA tells the error once more at the next launch that is checked, which shall not be a job's.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda").neg()
        what = f"{memory.nbytes / 2**30:.2f} GiB of host memory cannot be locked for CUDA: {_named(code)}"
        raise OutOfMemory(f"{what}; free host memory, or choose a mode in which weights stay on the device")


def _unregister(address: int) -> None:
    code = torch.cuda.cudart().cudaHostUnregister(address)
    assert int(code) == 0, f"host memory cannot be unlocked: {_named(code)}"


def _named(code: object) -> str:
    return torch.cuda.cudart().cudaGetErrorString(code)
