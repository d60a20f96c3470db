"""Which GPUs this machine has, and what the flags about them may say."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.errors import UsageProblem
from shared.allocations import ALLOCATIONS, MAX_VAE_RANKS, RANKS_FOR_24_HEADS, RANKS_OF
from shared.memory.choose import DeviceFacts
from shared.memory.modes import VramMode

_LOOK_TIMEOUT_S = 60
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Of CUDA and of ROCm."""
_LOOK = """
import dataclasses, json, sys
from shared.memory.devices import Devices
facts = [device.facts for device in Devices().look()]
json.dump([dataclasses.asdict(gpu) for gpu in facts if gpu is not None], sys.stdout)
"""


@functools.cache
def gpus_here() -> tuple[DeviceFacts, ...]:
    """The GPUs that PyTorch sees, once a command; asked in a process of its own: importing it here would slow every
    command down.
    """
    return look_at_gpus() if any(driver.exists() for driver in _DRIVERS) else ()


def look_at_gpus() -> tuple[DeviceFacts, ...]:
    """The same now, whether or not there is a driver."""
    command = [sys.executable, "-P", "-c", _LOOK]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_LOOK_TIMEOUT_S, check=True)
    return tuple(DeviceFacts(**facts) for facts in json.loads(result.stdout.splitlines()[-1]))


def gpus_for(device: str) -> tuple[DeviceFacts, ...]:
    """Those of this machine, looked at only if `--device` can mean one."""
    return () if device == "cpu" else gpus_here()


def usable(gpus: Sequence[DeviceFacts], device: str) -> tuple[DeviceFacts, ...]:
    """Those that `--device` allows.

    Raises:
        UsageProblem: it names one that is not there, or any where there is none.
    """
    allowed = tuple(gpu for gpu in gpus if device in ("auto", "cuda", gpu.name))
    if not allowed and device.startswith("cuda"):
        there = ", ".join(gpu.name for gpu in gpus) or "no GPU that PyTorch can use; see `ovi doctor`"
        raise UsageProblem(f"--device {device}: this machine has {there}")
    return allowed


def parse_mode(wanted: str) -> VramMode:
    """The value of `--vram-mode`.

    Raises:
        UsageProblem: it is none.
    """
    names = [mode.value for mode in VramMode]
    if wanted not in names:
        raise UsageProblem(f"--vram-mode: got {wanted!r}, allowed is one of {', '.join(names)}")
    return VramMode(wanted)


def require_plan(wanted: str) -> str:
    """The value of `--plan`.

    Raises:
        UsageProblem: it is none.
    """
    if wanted not in ALLOCATIONS:
        raise UsageProblem(f"--plan: got {wanted!r}, allowed is one of {', '.join(ALLOCATIONS)}")
    return wanted


def choose_gpus(wanted: str, device: str, plan: str, gpus: Sequence[DeviceFacts]) -> int | None:
    """The number of GPUs for `--gpus`; None for "auto" where there are some and the plan takes any number.

    Without GPUs "auto" is what the plan needs, else 1.

    Args:
        wanted: value of `--gpus`.
        device: value of `--device`.
        plan: one of ALLOCATIONS.
        gpus: of this machine.

    Raises:
        UsageProblem: not a number, or no plan for it, or not that many there, or not what the plan needs.
    """
    needed = RANKS_OF.get(plan)
    there = len(usable(gpus, device))
    if wanted == "auto" and needed is not None:
        return _require_there(needed, device, f"--plan {plan}", gpus)
    if wanted == "auto":
        number = None if there else 1
    elif not wanted.isdecimal() or int(wanted) not in RANKS_FOR_24_HEADS:
        legal = ", ".join(map(str, RANKS_FOR_24_HEADS))
        raise UsageProblem(f"--gpus: got {wanted!r}, allowed is auto or one of {legal}")
    else:
        number = _require_there(int(wanted), device, "--gpus", gpus)
    if needed is not None and number != needed:
        raise UsageProblem(f"--plan {plan} is for {needed} GPUs, got --gpus {number}; leave one of the two flags out")
    if plan == "fsdp" and (number or there) == 1:
        raise UsageProblem("--plan fsdp shares the weights among at least 2 GPUs, there is 1; see --gpus")
    return number


def choose_vae_gpus(wanted: str, device: str, gpus: Sequence[DeviceFacts]) -> int | None:
    """The number of GPUs for `--vae-gpus`; None for "auto": what the stack's plan says.

    Raises:
        UsageProblem: not a legal number, or not that many there.
    """
    if wanted == "auto":
        return None
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_VAE_RANKS:
        raise UsageProblem(f"--vae-gpus: got {wanted!r}, allowed is auto or 1 to {MAX_VAE_RANKS}")
    return _require_there(int(wanted), device, "--vae-gpus", gpus)


def _require_there(number: int, device: str, flag: str, gpus: Sequence[DeviceFacts]) -> int:
    if number > 1 and device not in ("auto", "cuda", "cpu"):
        raise UsageProblem(f"{flag} {number} needs --device auto or cuda, got --device {device}")
    if number > 1 and device != "cpu" and number > len(gpus):
        raise UsageProblem(f"{flag}: got {number}, this machine has {len(gpus)}")
    return number
