"""Devices and plans of several services as those of one stack. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ovi.common.v1 import system_pb2 as pb
from shared.memory.choose import gib
from shared.memory.device_state import DeviceState
from shared.memory.estimate import CONTEXT
from shared.memory.modes import RECIPES
from shared.system_proto import vram_mode_from_proto

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class StageDevices:
    """What one service says."""

    stage: str
    """Its name."""
    host: str
    """Where it runs."""
    devices: tuple[DeviceState, ...]


def host_of(address: str) -> str:
    """The host of host:port; loopback has one name."""
    host = address.rpartition(":")[0]
    return "localhost" if host in _LOOPBACK_NAMES else host


def device_key(host: str, device: DeviceState) -> str:
    """What names a device in the whole stack."""
    return device.uuid or named_key(host, device.name)


def named_key(host: str, name: str) -> str:
    """The key of a device that has no uuid."""
    return f"{host}/{name}"


def merged_devices(answers: Sequence[StageDevices]) -> dict[str, DeviceState]:
    """Every device once, by its key, which is its uuid from now on.

    What the services hold of a device is theirs together, the rest is others'.
    """
    merged: dict[str, DeviceState] = {}
    in_services: dict[str, int] = {}
    for answer in answers:
        for device in answer.devices:
            key = device_key(answer.host, device)
            known = merged.get(key, replace(device, own_bytes=0))
            # Of the services' answers the last is the newest.
            merged[key] = replace(device, name=known.name, uuid=key, own_bytes=known.own_bytes + device.own_bytes)
            used = device.total_bytes - device.free_bytes
            in_services[key] = in_services.get(key, 0) + used - device.others_bytes
    return {
        key: replace(device, others_bytes=max(0, device.total_bytes - device.free_bytes - in_services[key]))
        for key, device in merged.items()
    }


def combined_plan(plans: Mapping[str, pb.MemoryPlan], devices: Mapping[str, DeviceState]) -> pb.MemoryPlan:
    """The plan of a stack: that of its fullest device.

    In a mode whose stages take turns each process keeps its context, and one at a time has the rest; else all of them
    have what they take at once.

    Args:
        plans: by stage; "fusion" is there, and its mode is the stack's.
        devices: by `pb.MemoryPlan.device`, as far as they are known; plans say by it which device they share, and one
            that says none is taken to share fusion's.
    """
    fusion = plans["fusion"]
    mode = vram_mode_from_proto(fusion.vram_mode, field="vram_mode")
    takes_turns = RECIPES[mode].takes_turns
    sharing: dict[str, dict[str, pb.MemoryPlan]] = {}
    for stage, plan in plans.items():
        sharing.setdefault(plan.device or fusion.device, {})[stage] = plan
    needs = []
    for device, by_stage in sharing.items():
        alone = list(by_stage.values())
        contexts = [plan.component_bytes.get(CONTEXT, 0) for plan in alone]
        # A stage that nothing limits sends 0.
        rooms = [plan.available_bytes or math.inf for plan in alone]
        if takes_turns:
            total = sum(contexts) + max(plan.total_bytes - own for plan, own in zip(alone, contexts, strict=True))
            room = sum(contexts) + max(room - own for room, own in zip(rooms, contexts, strict=True))
        else:
            total = sum(plan.total_bytes for plan in alone)
            room = sum(rooms)
        if device in devices:
            room = min(room, _ours(devices[device], sum(contexts)))
        needs.append((device, total, room, by_stage))
    device, total, room, by_stage = max(needs, key=lambda need: (need[1] - need[2], need[1]))
    fits = all(plan.fits for plan in plans.values()) and all(total <= room for _, total, room, _ in needs)
    available = 0 if room == math.inf else int(room)
    return pb.MemoryPlan(
        vram_mode=fusion.vram_mode,
        allocation=fusion.allocation,
        component_bytes={
            f"{stage} {name}": size for stage, plan in by_stage.items() for name, size in plan.component_bytes.items()
        },
        total_bytes=total,
        available_bytes=available,
        fits=fits,
        explanation=_explained(plans, fits, f"{mode.value} takes {gib(total)}", available),
        device=device,
    )


def _ours(device: DeviceState, context_bytes: int) -> int:
    """What the stack may have of a device: all but what others have, among which its own contexts may be counted."""
    return device.total_bytes - max(0, device.others_bytes - context_bytes)


def _explained(plans: Mapping[str, pb.MemoryPlan], fits: bool, takes: str, available: int) -> str:
    if fits:
        return plans["fusion"].explanation
    lacking = [f"{stage}: {plan.explanation}" for stage, plan in plans.items() if not plan.fits]
    together = f"{takes} on one device for all stages together, {gib(available)} may be used"
    return "; ".join(lacking) or f"{together}; choose a mode that takes less"
