"""The flat host buffer: values, strides and shared memory stay; memory goes."""

from __future__ import annotations

import weakref

import pytest
import torch

from shared.errors import OutOfMemory
from shared.memory.host import ALIGNMENT_BYTES, HostBuffer


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    whole = torch.randn(7, 5)
    packed = torch.randn(9, 4).to(torch.bfloat16)
    q, k, v = packed.split(3)
    eighths = torch.randn(6, 3).to(torch.float8_e4m3fn)
    return {
        "whole": whole,
        "again": whole,
        "turned": whole.T,
        "rows": whole[2:4],
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "k": k,
        "v": v,
        "q": q,
        "eighths": eighths,
        "number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "whole numbers": torch.randint(0, 99, (3,)),
    }


def _bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_values_strides_and_sharing_stay() -> None:
    tensors = _tensors()
    host = HostBuffer(tensors, pin=False)
    # A copy at another place, the first bytes of something larger.
    device_bytes = torch.empty(host.num_bytes + 64, dtype=torch.uint8)
    device_bytes[: host.num_bytes] = host.bytes
    views = host.views(device_bytes)
    assert views.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = views[name]
        assert (view.dtype, view.shape, view.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert _bits(view) == _bits(tensor), name
    views["whole"][2, 1] = 77.0
    assert views["again"][2, 1] == views["turned"][1, 2] == views["rows"][0, 1] == 77.0
    assert tensors["whole"][2, 1] != 77.0
    assert views["k"].data_ptr() == views["q"].data_ptr() + views["q"].nbytes
    assert views["v"].data_ptr() == views["k"].data_ptr() + views["k"].nbytes


def test_nothing_is_there_twice_and_everything_begins_aligned() -> None:
    tensors = _tensors()
    host = HostBuffer(tensors, pin=False)
    # One of the tensors that share memory each, and no further ones.
    own = ["whole", "channels_last", "eighths", "number", "whole numbers"]
    least = sum(tensors[name].nbytes for name in own) + 9 * 4 * 2
    assert least <= host.num_bytes < least + 6 * ALIGNMENT_BYTES
    views = host.views(host.bytes)
    for name in [*own, "q"]:
        assert (views[name].data_ptr() - host.bytes.data_ptr()) % ALIGNMENT_BYTES == 0, name


def test_parts_of_a_large_memory_bring_only_themselves() -> None:
    large = torch.randn(100_000)
    host = HostBuffer({"end": large[-3:], "begin": large[:5]}, pin=False)
    assert host.num_bytes < 2 * ALIGNMENT_BYTES
    assert torch.equal(host.views(host.bytes)["end"], large[-3:])


def test_memory_goes_with_its_last_view() -> None:
    host = HostBuffer({"x": torch.ones(3)}, pin=False)
    memory = weakref.ref(host.bytes.untyped_storage())
    view = host.views(host.bytes)["x"]
    host.close()
    del host
    assert view.tolist() == [1, 1, 1]
    del view
    assert memory() is None


def test_no_tensors_are_no_bytes() -> None:
    host = HostBuffer({}, pin=False)
    assert host.num_bytes == 0
    assert host.views(host.bytes) == {}


def test_more_than_the_host_has_is_refused() -> None:
    with pytest.raises(OutOfMemory, match=r"1048576\.00 GiB of host memory cannot be had"):
        HostBuffer({"x": torch.empty(1 << 50, dtype=torch.uint8, device="meta")}, pin=False)
