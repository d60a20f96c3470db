"""How many GPUs the fusion and VAE services get, and how those of fusion share the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cli.errors import UsageProblem

_COUNT_TIMEOUT_S = 60
_LEGAL = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Ranks among which guidance and the 24 heads of the model can be shared; see services.fusion.parallel.plan."""

PLANS = ("auto", "single", "multi_2", "multi_4", "multi_8", "fsdp")
"""See services.fusion.parallel.plan."""
_GPUS_OF_PLAN = {"single": 1, "multi_2": 2, "multi_4": 4, "multi_8": 8}

MAX_VAE_GPUS = 8
"""Beyond it the stripes of a picture are so low that most of the work is at their edges."""


def choose_gpus(wanted: str, device: str, plan: str = "auto") -> int:
    """The number of GPUs for `--gpus`: "auto" is what the plan needs, or the most on this machine, 1 without any.

    Args:
        wanted: value of `--gpus`.
        device: value of `--device`.
        plan: one of PLANS.

    Raises:
        UsageProblem: not a number, or no plan for it, or not that many there, or not what the plan needs.
    """
    needed = _GPUS_OF_PLAN.get(plan)
    if wanted == "auto" and needed is not None:
        return _require_there(needed, device, f"--plan {plan}")
    if wanted == "auto":
        there = _count() if device in ("auto", "cuda") else 1
        number = max(number for number in _LEGAL if number <= max(there, 1))
    elif not wanted.isdecimal() or int(wanted) not in _LEGAL:
        raise UsageProblem(f"--gpus: got {wanted!r}, allowed is auto or one of {', '.join(map(str, _LEGAL))}")
    else:
        number = _require_there(int(wanted), device, "--gpus")
    if needed is not None and number != needed:
        raise UsageProblem(f"--plan {plan} is for {needed} GPUs, got --gpus {number}; leave one of the two flags out")
    if plan == "fsdp" and number == 1:
        raise UsageProblem("--plan fsdp shares the weights among at least 2 GPUs, there is 1; see --gpus")
    return number


def require_plan(wanted: str, quantization: str) -> str:
    """The value of `--plan`.

    Raises:
        UsageProblem: it is none, or cannot be had with this `--quantization`.
    """
    if wanted not in PLANS:
        raise UsageProblem(f"--plan: got {wanted!r}, allowed is one of {', '.join(PLANS)}")
    if wanted == "fsdp" and quantization != "none":
        raise UsageProblem(f"--plan fsdp needs --quantization none, got {quantization}")
    return wanted


def choose_vae_gpus(wanted: str, device: str) -> int | None:
    """The number of GPUs for `--vae-gpus`; None for "auto": what the stack's plan says.

    Raises:
        UsageProblem: not a legal number, or not that many there.
    """
    if wanted == "auto":
        return None
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_VAE_GPUS:
        raise UsageProblem(f"--vae-gpus: got {wanted!r}, allowed is auto or 1 to {MAX_VAE_GPUS}")
    return _require_there(int(wanted), device, "--vae-gpus")


def _require_there(number: int, device: str, flag: str) -> int:
    if number > 1 and device not in ("auto", "cuda", "cpu"):
        raise UsageProblem(f"{flag} {number} needs --device auto or cuda, got --device {device}")
    if number > 1 and device != "cpu" and number > (there := _count()):
        raise UsageProblem(f"{flag}: got {number}, this machine has {there}")
    return number


def _count() -> int:
    """GPUs that PyTorch sees, asked in a process of its own: importing it here would slow every command down."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_COUNT_TIMEOUT_S, check=True)
    return int(result.stdout)
