"""The ranks of one fusion service, as torchrun starts them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from services.fusion.parallel.control import ControlChannel
from services.fusion.parallel.groups import Groups, make_groups
from services.fusion.parallel.plan import ParallelPlan

_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another inside a run before it gives up and ends; the longest step takes a few seconds."""
_PR_SET_PDEATHSIG = 1
_LEADER_KEY = "leader"
_LEADER_POLL_S = 0.1


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    local_rank: int
    """Among the ranks of this host: the number of its GPU."""
    world_size: int
    store_host: str
    """Where the ranks meet."""
    store_port: int
    attempt: int
    """How often torchrun has started the group again; addresses of earlier attempts are stale."""
    agent_serves_store: bool
    """True if torchrun itself serves the store, False if rank 0 has to."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """What torchrun has set; a single rank without it."""
        return cls(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
            store_host=environment.get("MASTER_ADDR", "127.0.0.1"),
            store_port=int(environment.get("MASTER_PORT", "0")),
            attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            agent_serves_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def rank_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of this rank: with several ranks, each has a GPU of its own."""
    if device.type == "cuda" and ranks.world_size > 1:
        return torch.device("cuda", ranks.local_rank)
    return device


def join_group(ranks: Ranks, plan: ParallelPlan, device: torch.device) -> tuple[Groups, ControlChannel]:
    """Meet the other ranks; every rank calls it once, before it starts threads.

    Raises:
        ValueError: the plan is for another number of ranks.
    """
    serves = ranks.rank == 0 and not ranks.agent_serves_store
    tcp = TCPStore(ranks.store_host, ranks.store_port, ranks.world_size, is_master=serves)
    store = PrefixStore(f"ovi/attempt_{ranks.attempt}", tcp)
    here = socket.gethostname()
    if ranks.rank == 0:
        store.set(_LEADER_KEY, f"{here} {os.getpid()}")
    else:
        host, pid = store.get(_LEADER_KEY).decode().rsplit(" ", 1)
        _outlive_signals(int(pid) if host == here else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return make_groups(plan), ControlChannel()


def _outlive_signals(leader_pid: int | None) -> None:
    """Let rank 0 decide when this follower ends: on SIGTERM it drains, and then says stop. If it is gone, end at once.

    A thread waits for the signals, since the main thread may be inside a collective and could not handle them; they
    reach it through a socket, which works whichever thread the kernel gives them to. The process of a leader on
    another host cannot be seen; its lost connections then end this one.
    """
    arriving, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        arriving.recv(1)
        while leader_pid is None or _is_alive(leader_pid):
            time.sleep(_LEADER_POLL_S)
        os._exit(1)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end_with_parent() -> None:
    """Be killed when torchrun is, so that no rank outlives its group (Linux; elsewhere the lost connections end it)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
