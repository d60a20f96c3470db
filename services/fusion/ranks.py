"""The ranks of one fusion service, as torchrun starts them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from services.fusion.parallel.control import ControlChannel
from services.fusion.parallel.groups import Groups, make_groups
from services.fusion.parallel.plan import ParallelPlan

_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another inside a run before it gives up and ends; the longest step takes a few seconds."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    local_rank: int
    """Among the ranks of this host: the number of its GPU."""
    world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """What torchrun has set; a single rank without it."""
        values = (int(environment.get(name, default)) for name, default in _VARIABLES)
        return cls(*values)


_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def rank_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of this rank: with several ranks, each has a GPU of its own."""
    if device.type == "cuda" and ranks.world_size > 1:
        return torch.device("cuda", ranks.local_rank)
    return device


def join_group(plan: ParallelPlan, device: torch.device) -> tuple[Groups, ControlChannel]:
    """Meet the other ranks; every rank calls it once.

    Raises:
        ValueError: the plan is for another number of ranks.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_COLLECTIVE_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    return make_groups(plan), ControlChannel()


def become_follower() -> None:
    """Let rank 0 decide when this process ends: it drains on SIGTERM and then says stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent() -> None:
    """Be killed when torchrun is, so that no rank outlives its group (Linux; elsewhere the lost connections end it)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
