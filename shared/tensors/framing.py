"""How a tensor looks on the wire: a strictly parsed safetensors header, its values, a CRC-32C.

Everything is checked against bounds before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import torch

from ovi.common.v1 import tensor_pb2 as pb
from shared.errors import CorruptTensor, FieldViolation, InvalidRequest

CHUNK_BYTES = 1 << 20
"""Largest chunk of a stream; leaves room for framing under gRPC's 4 MiB and is the fastest measured."""
MAX_HEADER_BYTES = 4096
MAX_DIMENSIONS = 8
_LENGTH = struct.Struct("<Q")
_TENSOR_NAME = "tensor"

_DTYPES: tuple[tuple[torch.dtype, pb.DataType.ValueType, str], ...] = (
    (torch.float32, pb.DATA_TYPE_FLOAT32, "F32"),
    (torch.float16, pb.DATA_TYPE_FLOAT16, "F16"),
    (torch.bfloat16, pb.DATA_TYPE_BFLOAT16, "BF16"),
    (torch.uint8, pb.DATA_TYPE_UINT8, "U8"),
)
_TO_PROTO = {dtype: proto for dtype, proto, _ in _DTYPES}
_TO_NAME = {dtype: name for dtype, _, name in _DTYPES}
_FROM_PROTO = {proto: dtype for dtype, proto, _ in _DTYPES}
_FROM_NAME = {name: dtype for dtype, _, name in _DTYPES}


@dataclass(frozen=True)
class TensorSpec:
    """Element type, shape and checksum of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32c: int

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def value_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a contiguous CPU tensor, row-major, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a contiguous CPU tensor; reads its values once for the checksum.

    Raises:
        ValueError: a dtype that has no place on the wire.
    """
    if tensor.dtype not in _TO_PROTO:
        raise ValueError(f"dtype {tensor.dtype} cannot travel; convert to one of {[str(d) for d in _TO_PROTO]}")
    checksum = google_crc32c.Checksum()
    for chunk in chunks_of(tensor):
        checksum.update(chunk)
    return TensorSpec(tensor.dtype, tuple(tensor.shape), int.from_bytes(checksum.digest(), "big"))


def chunks_of(tensor: torch.Tensor) -> Iterator[bytes]:
    """The values in pieces of at most CHUNK_BYTES."""
    values = value_bytes(tensor)
    for start in range(0, len(values), CHUNK_BYTES):
        yield bytes(values[start : start + CHUNK_BYTES])


def spec_to_proto(spec: TensorSpec) -> pb.TensorSpec:
    """The wire form of a spec."""
    return pb.TensorSpec(
        data_type=_TO_PROTO[spec.dtype], shape=spec.shape, num_bytes=spec.num_bytes, crc32c=spec.crc32c
    )


def spec_from_proto(message: pb.TensorSpec, *, field: str, max_bytes: int) -> TensorSpec:
    """The spec a peer announced, after checking that it is consistent and fits `max_bytes`.

    Raises:
        InvalidRequest: unknown dtype, bad shape, or a size that disagrees or is too large; fields start with `field`.
    """
    violations = []
    dtype = _FROM_PROTO.get(message.data_type)
    if dtype is None:
        names = ", ".join(pb.DataType.Name(v) for v in _FROM_PROTO)
        violations.append(FieldViolation(f"{field}.data_type", f"got {message.data_type}, allowed is {names}"))
    shape = tuple(message.shape)
    if len(shape) > MAX_DIMENSIONS or any(not 0 <= size < 2**31 for size in shape):
        what = f"got {list(shape)[: MAX_DIMENSIONS + 1]}, allowed is at most {MAX_DIMENSIONS} sizes of 0 to 2^31-1"
        violations.append(FieldViolation(f"{field}.shape", what))
    elif dtype is not None:
        expected = math.prod(shape) * dtype.itemsize
        if message.num_bytes != expected:
            what = f"got {message.num_bytes}, but shape {list(shape)} of {dtype} has {expected} bytes"
            violations.append(FieldViolation(f"{field}.num_bytes", what))
        elif expected > max_bytes:
            violations.append(FieldViolation(f"{field}.num_bytes", f"got {expected}, allowed is at most {max_bytes}"))
    if violations or dtype is None:
        raise InvalidRequest(violations)
    return TensorSpec(dtype, shape, message.crc32c)


def safetensors_header(spec: TensorSpec) -> bytes:
    """The safetensors prefix for this one tensor, so that prefix + values is a valid file."""
    entry = {"dtype": _TO_NAME[spec.dtype], "shape": list(spec.shape), "data_offsets": [0, spec.num_bytes]}
    text = json.dumps({_TENSOR_NAME: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def check_safetensors_header(header: bytes, spec: TensorSpec) -> None:
    """Check that a received prefix says exactly what the spec says.

    Raises:
        CorruptTensor: too long, truncated, no JSON, another tensor, or another dtype, shape or extent.
    """
    if not _LENGTH.size < len(header) <= MAX_HEADER_BYTES:
        raise CorruptTensor(f"safetensors header of {len(header)} bytes; allowed is 9 to {MAX_HEADER_BYTES}")
    (length,) = _LENGTH.unpack_from(header)
    if length != len(header) - _LENGTH.size:
        raise CorruptTensor(f"safetensors header announces {length} bytes but has {len(header) - _LENGTH.size}")
    try:
        entries = json.loads(header[_LENGTH.size :], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptTensor(f"safetensors header is no JSON object: {error}") from None
    expected = {
        _TENSOR_NAME: {
            "dtype": _TO_NAME[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [0, spec.num_bytes],
        }
    }
    if entries != expected:
        raise CorruptTensor(f"safetensors header says {str(entries)[:200]}, the reference says {expected}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


class TensorAssembler:
    """Collects the chunks of one tensor into memory allocated once, then verifies size and checksum."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self._values = value_bytes(self._tensor)
        self._checksum = google_crc32c.Checksum()
        self._received = 0

    def add(self, chunk: bytes) -> None:
        """Append the next bytes.

        Raises:
            CorruptTensor: more bytes than announced, or an oversized chunk.
        """
        end = self._received + len(chunk)
        if len(chunk) > CHUNK_BYTES or end > self._spec.num_bytes:
            what = f"{end} bytes came in chunks of {len(chunk)}; announced are {self._spec.num_bytes}"
            raise CorruptTensor(f"tensor stream is oversized: {what} in chunks of at most {CHUNK_BYTES}")
        self._values[self._received : end] = chunk
        self._checksum.update(chunk)
        self._received = end

    def finish(self) -> torch.Tensor:
        """The complete tensor.

        Raises:
            CorruptTensor: bytes are missing, or the checksum differs.
        """
        if self._received != self._spec.num_bytes:
            raise CorruptTensor(f"tensor stream ended after {self._received} of {self._spec.num_bytes} bytes")
        checksum = int.from_bytes(self._checksum.digest(), "big")
        if checksum != self._spec.crc32c:
            raise CorruptTensor(f"tensor checksum is {checksum:08x}, announced is {self._spec.crc32c:08x}; fetch again")
        return self._tensor
