"""How many GPUs the fusion and VAE services get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cli.errors import UsageProblem

_COUNT_TIMEOUT_S = 60
_LEGAL = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Ranks among which guidance and the 24 heads of the model can be shared; see services.fusion.parallel.plan."""

MAX_VAE_GPUS = 8
"""Beyond it the stripes of a picture are so low that most of the work is at their edges."""


def choose_gpus(wanted: str, device: str) -> int:
    """The number of GPUs for `--gpus`: "auto" is the most on this machine that a plan can use, 1 without any.

    Raises:
        UsageProblem: not a number, or no plan for it, or not that many there.
    """
    if wanted == "auto":
        there = _count() if device in ("auto", "cuda") else 1
        return max(number for number in _LEGAL if number <= max(there, 1))
    if not wanted.isdecimal() or int(wanted) not in _LEGAL:
        raise UsageProblem(f"--gpus: got {wanted!r}, allowed is auto or one of {', '.join(map(str, _LEGAL))}")
    return _require_there(int(wanted), device, "--gpus")


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
