"""The ranks of one service, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from shared.group.control import ControlChannel
from shared.tls import INSECURE_FLAG, is_loopback

LOOPBACK = "127.0.0.1"
EXIT_GROUP_FAILED = 4
"""Exit status of a rank that cannot go on because of another one; torchrun starts the group again."""
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another inside a run before it gives up and ends; the longest step takes a few seconds."""
_MEETING_TIMEOUT = timedelta(seconds=300)
"""How long ranks wait for each other at the start."""
_LEAVING_TIMEOUT = timedelta(seconds=60)
"""How long a rank that is done waits for the others to be."""
_HELLO_AGAIN = timedelta(seconds=5)
_HELLOS = "ovi/hellos"


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
    agent_serves_store: bool
    """True if torchrun itself serves the store, False if rank 0 has to."""
    num_hosts: int = 1
    """On which the ranks run, an agent of torchrun each."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """What torchrun has set; a single rank without it."""
        return cls(
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
            store_host=environment.get("MASTER_ADDR", "127.0.0.1"),
            store_port=int(environment.get("MASTER_PORT", "0")),
            agent_serves_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            num_hosts=int(environment.get("GROUP_WORLD_SIZE", "1")),
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

    def __init__(self, channel: ControlChannel, store: Store, watched: list[int]) -> None:
        """
        Args:
            channel: to the other ranks.
            store: where the ranks met.
            watched: processes on this host to die with.
        """
        self.channel = channel
        self._store = store
        self._parting = threading.Event()
        if watched:
            threading.Thread(target=self._watch, args=(watched,), name="fellows", daemon=True).start()

    def part(self) -> None:
        """The group ends in order: from now on the others may go."""
        self._parting.set()

    def leave(self) -> None:
        """End the process groups, when every rank is done; all of them call it.

        A rank that goes closes its connections, which fails a collective that another one is still in. So they wait for
        each other at the store.

        Raises:
            DistStoreError: another rank did not come.
        """
        self.part()
        world_size = dist.get_world_size()
        self._arrive("done", world_size)
        self._store.wait(["all/done"], _LEAVING_TIMEOUT)
        dist.destroy_process_group()
        if self.channel.rank > 0:
            self._arrive("gone", world_size - 1)
        else:
            # It may serve the store, so it goes last.
            self._store.wait(["all/gone"], _LEAVING_TIMEOUT)

    def _arrive(self, what: str, expected: int) -> None:
        if self._store.add(what, 1) == expected:
            self._store.set(f"all/{what}", "")

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


def require_protected_group(ranks: Ranks, *, insecure: bool) -> None:
    """Refuse ranks that meet where other machines can reach them, in plain text, unless that was asked for.

    Args:
        ranks: this process among its fellows.
        insecure: plain text was asked for.

    Raises:
        ValueError: says what to do.
    """
    if ranks.world_size == 1 or insecure:
        return
    here = ranks.num_hosts == 1 and is_loopback(ranks.store_host) and not ranks.agent_serves_store
    if not here:
        raise ValueError(
            f"the ranks of this group meet at {ranks.store_host} in plain text, where other machines reach them;"
            " start those of one host with `python -m shared.group.launch` in place of torchrun,"
            f" or add {INSECURE_FLAG} for a network that you trust"
        )


def serve_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """A store that listens on this one interface; by itself PyTorch would listen on all of them.

    Args:
        host: a loopback address.
        port: TCP port; 0 picks a free one.
        timeout: of what is asked of it.

    Raises:
        OSError: the port is taken.
    """
    listener = socket.create_server((host, port))
    bound = listener.getsockname()[1]
    return TCPStore(
        host, bound, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _meeting_store(ranks: Ranks) -> TCPStore:
    serves = ranks.rank == 0 and not ranks.agent_serves_store
    if serves and is_loopback(ranks.store_host):
        return serve_store(ranks.store_host, ranks.store_port, _MEETING_TIMEOUT)
    return TCPStore(ranks.store_host, ranks.store_port, ranks.world_size, is_master=serves, timeout=_MEETING_TIMEOUT)


def join_group(ranks: Ranks, device: torch.device) -> Fellowship:
    """Meet the other ranks, which all call it once; on the device's backend (NCCL on CUDA, else gloo)."""
    tcp = _meeting_store(ranks)
    store = PrefixStore(f"ovi/{_name_meeting(tcp, ranks)}", tcp)
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
    return Fellowship(ControlChannel(), store, watched)


def _name_meeting(store: TCPStore, ranks: Ranks) -> str:
    """A name that all ranks of this attempt agree on and that no earlier attempt had.

    The store of torchrun outlives its attempts, and its count of restarts differs between hosts. So rank 0 makes the
    name up and gives it to whoever says hello; a follower that got it says so, and rank 0 waits until all have. Hellos
    of ranks that died are answered, too; nobody reads the answers.
    """
    own = uuid.uuid4().hex
    if ranks.rank > 0:
        deadline_s = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
        while True:
            store.queue_push(_HELLOS, f"hello {own}")
            try:
                store.wait([f"ovi/answers/{own}"], _HELLO_AGAIN)
                break
            except dist.DistStoreError:
                # What rank 0 of an earlier attempt took with it as it died is said again.
                if time.monotonic() > deadline_s:
                    raise
        name = store.get(f"ovi/answers/{own}").decode()
        store.queue_push(_HELLOS, f"here {name} {ranks.rank}")
        return name
    missing = set(range(1, ranks.world_size))
    while missing:
        word, *rest = store.queue_pop(_HELLOS).decode().split()
        if word == "hello":
            store.set(f"ovi/answers/{rest[0]}", own)
        elif rest[0] == own:
            missing.discard(int(rest[1]))
    return own


def end_torchrun() -> None:
    """Ask torchrun, which has started this rank, to end with all its ranks rather than to start them again."""
    os.kill(os.getppid(), signal.SIGTERM)
