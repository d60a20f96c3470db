"""This process's share of a device's memory: what there is, what it may take, what it took at most."""

from __future__ import annotations

import torch

from shared.memory.choose import DeviceFacts


def device_facts(device: torch.device) -> DeviceFacts | None:
    """What a choice of mode depends on; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return DeviceFacts(str(device), total, free, capability, bool(properties.is_integrated))


def free_to_take(device: torch.device) -> int | None:
    """Bytes that this process's allocator has or can get; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def limit_memory(device: torch.device, num_bytes: int) -> None:
    """Let this process's allocator reserve no more; on a CPU, plans alone keep to it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)


def reset_peak(device: torch.device) -> None:
    """Begin a measurement; nothing to measure on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def freed(device: torch.device) -> dict[str, float]:
    """GiB reserved by this process's allocator before and after it gave back what it did not use."""
    if device.type != "cuda":
        return {}
    before = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    after = torch.cuda.memory_reserved(device)
    return {"before_gib": round(before / 2**30, 2), "after_gib": round(after / 2**30, 2)}


def peak_gib(device: torch.device) -> float | None:
    """Most GiB reserved by this process's allocator since `reset_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
