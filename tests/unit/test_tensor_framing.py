"""Framing: what is sent can be read by the safetensors library, and nothing malformed is accepted or allocated."""

import json
import struct

import pytest
import safetensors.torch
import torch

from ovi.common.v1 import tensor_pb2 as pb
from shared.errors import CorruptTensor, InvalidRequest
from shared.tensors.framing import (
    CHUNK_BYTES,
    TensorAssembler,
    check_safetensors_header,
    chunks_of,
    safetensors_header,
    spec_from_proto,
    spec_of,
    spec_to_proto,
)

TENSORS = [
    torch.randn(3, 5),
    torch.randn(48, 31, 60, 60).bfloat16(),
    torch.randn(7).half(),
    torch.arange(256, dtype=torch.uint8),
    torch.empty(0, 4),
    torch.tensor(2.5),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_stream_is_a_valid_safetensors_file(tensor) -> None:
    spec = spec_of(tensor)
    chunks = list(chunks_of(tensor))
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    loaded = safetensors.torch.load(safetensors_header(spec) + b"".join(chunks))["tensor"]
    assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_assembled_tensor_is_identical(tensor) -> None:
    spec = spec_from_proto(spec_to_proto(spec_of(tensor)), field="x", max_bytes=1 << 30)
    check_safetensors_header(safetensors_header(spec), spec)
    assembler = TensorAssembler(spec)
    for chunk in chunks_of(tensor):
        assembler.add(chunk)
    result = assembler.finish()
    assert result.dtype == tensor.dtype and torch.equal(result, tensor)


def test_truncated_oversized_and_corrupt_streams_are_refused() -> None:
    tensor = torch.randn(1000)
    spec = spec_of(tensor)
    (data,) = chunks_of(tensor)
    truncated = TensorAssembler(spec)
    truncated.add(data[:-1])
    with pytest.raises(CorruptTensor, match="ended after 3999 of 4000"):
        truncated.finish()
    with pytest.raises(CorruptTensor, match="oversized"):
        TensorAssembler(spec).add(data + b"x")
    with pytest.raises(CorruptTensor, match="oversized"):
        TensorAssembler(spec_of(torch.zeros(CHUNK_BYTES))).add(bytes(CHUNK_BYTES + 1))
    flipped = TensorAssembler(spec)
    flipped.add(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CorruptTensor, match="checksum"):
        flipped.finish()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data_type": 99}, "x.data_type"),
        ({"data_type": 0}, "x.data_type"),
        ({"shape": [-1, 4]}, "x.shape"),
        ({"shape": [1] * 9}, "x.shape"),
        ({"shape": [2**31]}, "x.shape"),
        ({"num_bytes": 61}, "x.num_bytes"),
        ({"shape": [2**30, 2**30, 4], "num_bytes": 2**64 - 1}, "x.num_bytes"),
        ({"shape": [1 << 20], "num_bytes": 4 << 20}, "x.num_bytes"),
    ],
)
def test_announcements_are_bounded_before_allocation(change, field) -> None:
    good = {"data_type": pb.DATA_TYPE_FLOAT32, "shape": [3, 5], "num_bytes": 60, "crc32c": 0}
    with pytest.raises(InvalidRequest) as caught:
        spec_from_proto(pb.TensorSpec(**(good | change)), field="x", max_bytes=1 << 20)
    assert field in [v.field for v in caught.value.violations]


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        _header(b"not json"),
        _header(b"[" * 2000),
        _header(b" " * 5000),
        _header(b"{}"),
        _header(json.dumps({"other": _ENTRY}).encode()),
        _header(json.dumps({"tensor": _ENTRY, "more": _ENTRY}).encode()),
        _header(json.dumps({"tensor": _ENTRY | {"dtype": "F64"}}).encode()),
        _header(json.dumps({"tensor": _ENTRY | {"shape": [3]}}).encode()),
        _header(json.dumps({"tensor": _ENTRY | {"data_offsets": [8, 16]}}).encode()),
        _header(b'{"tensor":' + json.dumps(_ENTRY).encode() + b',"tensor":' + json.dumps(_ENTRY).encode() + b"}"),
        _header(b"\xff\xfe{}"),
    ],
)
def test_malformed_safetensors_headers_are_refused(header) -> None:
    with pytest.raises(CorruptTensor):
        check_safetensors_header(header, spec_of(torch.zeros(2)))


def test_dtypes_without_a_place_on_the_wire_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        spec_of(torch.zeros(2, dtype=torch.float64))
