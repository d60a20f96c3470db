"""Writing weight files: under a temporary name, then renamed, so that a folder never holds half a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch

from shared.checkpoints import Layout
from shared.tensors.framing import value_bytes

Draw = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""Key, shape, dtype -> values."""

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def layout_bytes(layout: Layout) -> int:
    """Bytes of all values."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, layout: Layout, metadata: Mapping[str, str], draw: Draw) -> None:
    """Write tensor after tensor; no more than one is in memory.

    Args:
        path: of the file.
        layout: float32, bfloat16 and float8_e4m3fn tensors.
        metadata: strings for the header; may be empty.
        draw: gives each tensor's values, contiguous, on the CPU.
    """
    widest_first = sorted(layout, key=lambda key: -layout[key][0].itemsize)  # keeps every value aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in widest_first:
        dtype, shape = layout[key]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in widest_first:
            dtype, shape = layout[key]
            file.write(value_bytes(draw(key, shape, dtype)))


def write_pth(path: Path, layout: Layout, draw: Draw) -> None:
    """Write one flat dictionary of tensors with torch.save; all of them are in memory at once.

    Each gets memory of its own: what tensors share, torch.save writes once and as a whole.
    """
    tensors = {key: _with_own_memory(draw(key, shape, dtype)) for key, (dtype, shape) in layout.items()}
    with replacing(path) as file:
        torch.save(tensors, file)  # a file object, not a name: torch would put the temporary name inside


def _with_own_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
