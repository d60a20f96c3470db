"""The ranks of one service, as torchrun starts them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from shared.group.control import ControlChannel

EXIT_GROUP_FAILED = 4
"""Exit status of a rank that cannot go on because of another one; torchrun starts the group again."""
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


class Fellowship:
    """This rank's tie to the others: the control channel, and a watch that ends this process when one of them dies.

    Without the watch a rank would wait in a collective for a dead one until a timeout.
    """

    def __init__(self, channel: ControlChannel, watched: list[int]) -> None:
        """
        Args:
            channel: to the other ranks.
            watched: processes on this host to die with.
        """
        self.channel = channel
        self._parting = threading.Event()
        if watched:
            threading.Thread(target=self._watch, args=(watched,), name="fellows", daemon=True).start()

    def part(self) -> None:
        """The group ends in order: from now on the others may go."""
        self._parting.set()

    def leave(self) -> None:
        """End the process groups; after `part` on every rank."""
        self.part()
        dist.destroy_process_group()

    def _watch(self, watched: list[int]) -> None:
        try:
            fellows = [psutil.Process(pid) for pid in watched]
        except psutil.NoSuchProcess:
            self._lost()
            return
        psutil.wait_procs(fellows, callback=lambda _: self._lost())

    def _lost(self) -> None:
        if not self._parting.is_set():
            os._exit(EXIT_GROUP_FAILED)


def join_group(ranks: Ranks, device: torch.device) -> Fellowship:
    """Meet the other ranks, which all call it once; on the device's backend (NCCL on CUDA, else gloo)."""
    serves = ranks.rank == 0 and not ranks.agent_serves_store
    tcp = TCPStore(ranks.store_host, ranks.store_port, ranks.world_size, is_master=serves)
    store = PrefixStore(f"ovi/attempt_{ranks.attempt}", tcp)
    here = socket.gethostname()
    store.set(f"process/{ranks.rank}", f"{here} {os.getpid()}")
    # Rank 0 dies with any other, the others with rank 0, so that all of them end when one does.
    watched = []
    for rank in range(1, ranks.world_size) if ranks.rank == 0 else [0]:
        host, pid = store.get(f"process/{rank}").decode().rsplit(" ", 1)
        if host == here:
            watched.append(int(pid))
    if ranks.rank > 0:
        # Rank 0 decides when a follower ends: on SIGTERM it drains, and then says stop.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
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
    return Fellowship(ControlChannel(), watched)


def end_with_parent() -> None:
    """Be killed when torchrun is, so that no rank outlives its group (Linux; elsewhere the lost connections end it)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
