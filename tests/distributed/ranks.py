"""Runs a function on several gloo ranks, each a process of its own, and brings back what rank 0 saved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.service_process import free_port

TIMEOUT_S = 90


def _entry(
    rank: int, world: int, port: int, work: Callable[..., dict[str, torch.Tensor]], out: str, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    try:
        with torch.inference_mode():
            torch.save(work(*arguments), Path(out) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(
    world: int, work: Callable[..., dict[str, torch.Tensor]], *arguments: Any
) -> list[dict[str, torch.Tensor]]:
    """What `work(*arguments)` returns on each of `world` ranks."""
    port = free_port()
    with tempfile.TemporaryDirectory() as out:
        mp.start_processes(_entry, (world, port, work, out, arguments), nprocs=world, start_method="fork")
        return [torch.load(Path(out) / f"{rank}.pt", weights_only=True) for rank in range(world)]
