"""How many GPUs the fusion service gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cli.errors import UsageProblem

_COUNT_TIMEOUT_S = 60
_LEGAL = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Ranks among which guidance and the 24 heads of the model can be shared; see services.fusion.parallel.plan."""


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
    number = int(wanted)
    if number > 1 and device not in ("auto", "cuda", "cpu"):
        raise UsageProblem(f"--gpus {number} needs --device auto or cuda, got --device {device}")
    if number > 1 and device != "cpu" and number > (there := _count()):
        raise UsageProblem(f"--gpus: got {number}, this machine has {there}")
    return number


def _count() -> int:
    """GPUs that PyTorch sees, asked in a process of its own: importing it here would slow every command down."""
    if not Path("/dev/nvidiactl").exists():
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_COUNT_TIMEOUT_S, check=True)
    return int(result.stdout)
