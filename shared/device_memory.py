"""Peak device memory of one piece of work, for logs."""

from __future__ import annotations

import torch


def reset_peak(device: torch.device) -> None:
    """Begin a measurement; nothing to measure on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most GiB reserved by this process's allocator since `reset_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
