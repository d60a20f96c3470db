"""Protobuf <-> domain of devices and memory."""

from __future__ import annotations

from ovi.common.v1 import system_pb2 as pb
from shared.errors import InvalidRequest
from shared.memory.device_state import DeviceState
from shared.memory.estimate import Components
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


def memory_plan_to_proto(
    mode: VramMode,
    components: Components,
    budget_bytes: int | None,
    *,
    allocation: str = "single",
    fits: bool = True,
    explanation: str = "",
) -> pb.MemoryPlan:
    """The wire form of a stage's plan.

    Args:
        mode: not AUTO.
        components: of the device.
        budget_bytes: what the process's allocator may reserve; None: no limit, sent as 0.
        allocation: how the work is spread over devices.
        fits: whether it does.
        explanation: one line.
    """
    context = components.total - components.reserved
    return pb.MemoryPlan(
        vram_mode=vram_mode_to_proto(mode),
        allocation=allocation,
        component_bytes=components.by_name,
        total_bytes=components.total,
        available_bytes=0 if budget_bytes is None else budget_bytes + context,
        fits=fits,
        explanation=explanation,
    )


def device_to_proto(device: DeviceState) -> pb.Device:
    """The wire form of a device."""
    return pb.Device(
        name=device.name,
        model=device.model,
        uuid=device.uuid,
        backend=device.backend,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        own_bytes=device.own_bytes,
        others_bytes=device.others_bytes,
        capability=device.capability,
        unified=device.unified,
        utilization=device.utilization,
        links=device.links,
    )


def device_from_proto(message: pb.Device) -> DeviceState:
    """The device of a message."""
    return DeviceState(
        name=message.name,
        model=message.model,
        uuid=message.uuid,
        backend=message.backend,
        total_bytes=message.total_bytes,
        free_bytes=message.free_bytes,
        own_bytes=message.own_bytes,
        others_bytes=message.others_bytes,
        capability=message.capability,
        unified=message.unified,
        utilization=message.utilization if message.HasField("utilization") else None,
        links=tuple(message.links),
    )
