"""Reading weight files safely: safetensors, or torch.load with weights_only; nothing else is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from shared.errors import CheckpointError

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Key -> (dtype, shape) of every tensor of a weight file."""

_MAX_HEADER_BYTES = 64 << 20
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def require_file(path: Path) -> None:
    """Check that a weight file exists.

    Raises:
        CheckpointError: it does not; the message says how to get one.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Put the released weights there, or make synthetic ones with `ovi models synth`;"
            " `ovi models check DIR` tells what a folder lacks"
        )


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file holds, read without touching its values."""

    path: Path
    metadata: Mapping[str, str]
    layout: Layout

    @classmethod
    def read(cls, path: Path) -> SafetensorsHeader:
        """Read and check the header.

        Raises:
            CheckpointError: missing, truncated, or no safetensors file.
        """
        require_file(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or truncated ({size} bytes)")
            try:
                entries = json.loads(file.read(length))
                metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
                layout = {k: (_SAFETENSORS_DTYPES[e["dtype"]], tuple(e["shape"])) for k, e in entries.items()}
                end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path}: damaged safetensors header ({error!r}); copy the file again") from None
        if end != size:
            raise CheckpointError(f"{path}: has {size} bytes, its header announces {end}; the file is truncated")
        return cls(path, metadata, layout)

    def tensors(self, device: torch.device, keys: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) of these keys, moved from the memory map to `device` one at a time, without a second copy in
        RAM; None: of every key.

        Raises:
            CheckpointError: the values cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                for key in self.layout if keys is None else keys:
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {error}; copy the file again") from None

    def rows(self, wanted: Mapping[str, tuple[int, int]], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, rows [start, stop) of its tensor) for every key wanted, moved to `device`; no others are read.

        Raises:
            CheckpointError: the values cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                for key, (start, stop) in wanted.items():
                    dtype, shape = self.layout[key]
                    if start < stop:
                        rows = file.get_slice(key)[start:stop]
                        # On the CPU they are a view of the map, which would keep all of it.
                        yield key, rows.clone() if device.type == "cpu" else rows
                    else:
                        yield key, torch.empty(0, *shape[1:], dtype=dtype, device=device)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {error}; copy the file again") from None


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth/.pt file, memory-mapped, read with weights_only.

    A dictionary inside the file's dictionary is flattened: {"generator": {"bias": t}} is read as {"generator.bias": t}.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors.
    """
    require_file(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({reason})") from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or truncated ({reason}); copy the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a dictionary of tensors, holds {type(content).__name__}")
    return _flatten(path, content)


def _flatten(path: Path, content: Mapping[object, object]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for outer, value in content.items():
        entries = {f"{outer}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {outer: value}
        for key, tensor in entries.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or key in tensors:
                what = (
                    f"{str(key)[:100]!r} is {type(tensor).__name__}"
                    if key not in tensors
                    else f"{key!r} is there twice"
                )
                raise CheckpointError(f"{path}: must hold tensors by name, at most one level deep; {what}")
            tensors[key] = tensor
    return tensors


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Key -> (dtype, shape) of tensors in memory."""
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def layout_problems(found: Layout, expected: Layout, *, dtypes: bool = False) -> list[str]:
    """In words: what is missing, unexpected, or of another shape (and dtype, if asked for); empty if all fits."""
    problems = []
    for word, keys in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if keys:
            names = sorted(keys)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{len(names)} {word}: {', '.join(names[:5])}{more}")
    for key in sorted(expected.keys() & found.keys()):
        (found_dtype, found_shape), (dtype, shape) = found[key], expected[key]
        if found_shape != shape:
            problems.append(f"{key} has shape {list(found_shape)}, must be {list(shape)}")
        if dtypes and found_dtype != dtype:
            problems.append(f"{key} has dtype {found_dtype}, must be {dtype}")
    return problems


def require_layout(path: Path, found: Layout, expected: Layout) -> None:
    """Check keys and shapes before any value is read.

    Raises:
        CheckpointError: names the file and the first problems.
    """
    problems = layout_problems(found, expected)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems[:5])}{more}")


def assign_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in place of a module's (meta) parameters and buffers; nothing is copied. Keys must fit exactly."""
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()


def file_fingerprint(path: Path) -> str:
    """16 hex digits that change when the file does: SHA-256 of its size and of 64 evenly spread 64 KiB blocks.

    Not a proof of content (a whole hash of 23 GB takes a minute); enough to key caches and to name weights.
    """
    require_file(path)
    size = path.stat().st_size
    block = 64 << 10
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(64):
            file.seek(max(0, size - block) * index // 63)
            digest.update(file.read(block))
    return digest.hexdigest()[:16]
