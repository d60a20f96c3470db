"""Protobuf <-> domain of devices and memory."""

from __future__ import annotations

from ovi.common.v1 import system_pb2 as pb
from shared.errors import InvalidRequest
from shared.memory.modes import VramMode

_MODES = {
    pb.VRAM_MODE_UNSPECIFIED: VramMode.AUTO,
    pb.VRAM_MODE_STANDARD: VramMode.STANDARD,
    pb.VRAM_MODE_FP8: VramMode.FP8,
    pb.VRAM_MODE_FP8_OFFLOAD: VramMode.FP8_OFFLOAD,
    pb.VRAM_MODE_ULTRA_LOW: VramMode.ULTRA_LOW,
    pb.VRAM_MODE_STREAMED: VramMode.STREAMED,
    pb.VRAM_MODE_ALL_GPU: VramMode.ALL_GPU,
}
_MODES_TO_PROTO = {mode: proto for proto, mode in _MODES.items()}


def vram_mode_from_proto(value: pb.VramMode.ValueType, *, field: str) -> VramMode:
    """The mode a number stands for.

    Raises:
        InvalidRequest: a number that has no name.
    """
    if value not in _MODES:
        names = ", ".join(pb.VramMode.Name(known) for known in _MODES)
        raise InvalidRequest.of(field, f"got {value}, allowed is {names}")
    return _MODES[value]


def vram_mode_to_proto(mode: VramMode) -> pb.VramMode.ValueType:
    """The number of a mode."""
    return _MODES_TO_PROTO[mode]
