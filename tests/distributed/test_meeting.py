"""Ranks meet over a store that outlives them, whatever earlier attempts have left in it, and leave together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore

from shared.group.ranks import Ranks, join_group
from shared.group.steps import stop_followers
from tests.service_process import free_port

TIMEOUT_S = 30
WORLD = 3
HELLOS = "ovi/hellos"


@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _meet(rank: int, port: int, results: mp.Queue[tuple[int, bool]]) -> None:
    ranks = Ranks(rank, rank, WORLD, "127.0.0.1", port, agent_serves_store=True, num_hosts=1)
    fellowship = join_group(ranks, torch.device("cpu"))
    results.put((rank, fellowship.channel.agree(True)))
    fellowship.leave()


def _leave(rank: int, port: int, left: Event) -> None:
    """Rank 1 is late: it leaves when the others wait at the store, and finds that none has gone without it."""
    ranks = Ranks(rank, rank, WORLD, "127.0.0.1", port, agent_serves_store=False)
    fellowship = join_group(ranks, torch.device("cpu"))
    if rank == 1:
        until(lambda: fellowship._store.add("done", 0) == WORLD - 1)
        assert not left.is_set()
    fellowship.leave()
    left.set()


def _stop(rank: int, port: int) -> None:
    """Followers end at once; rank 0 stops them when their processes have gone."""
    ranks = Ranks(rank, rank, WORLD, "127.0.0.1", port, agent_serves_store=True)
    fellowship = join_group(ranks, torch.device("cpu"))
    fellowship.part()
    store = fellowship._store
    fellowship._arrive("met", WORLD)
    store.wait(["all/met"])
    if rank > 0:
        os._exit(0)
    pids = [int(store.get(f"process/{other}").split()[1]) for other in range(1, WORLD)]
    until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids))
    stop_followers(fellowship)


def start(ranks: list[int], store: TCPStore) -> tuple[list[BaseProcess], mp.Queue[tuple[int, bool]]]:
    context = mp.get_context("fork")
    results: mp.Queue[tuple[int, bool]] = context.Queue()
    processes: list[BaseProcess] = []
    for rank in ranks:
        process = context.Process(target=_meet, args=(rank, store.port, results), daemon=True)
        process.start()
        processes.append(process)
    return processes, results


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(TIMEOUT_S)


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline_s


def assert_all_meet(store: TCPStore) -> None:
    processes, results = start(list(range(WORLD)), store)
    assert sorted(results.get(timeout=TIMEOUT_S) for _ in range(WORLD)) == [(rank, True) for rank in range(WORLD)]
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0


def test_every_attempt_meets_anew(store) -> None:
    for _ in range(2):
        assert_all_meet(store)


def test_followers_that_died_waiting_are_not_waited_for(store) -> None:
    followers, _ = start([1, 2], store)
    until(lambda: store.queue_len(HELLOS) == 2)
    kill(followers)
    assert_all_meet(store)


def test_a_leader_that_died_waiting_takes_no_hello_with_it(store) -> None:
    followers, _ = start([1], store)
    until(lambda: store.queue_len(HELLOS) == 1)
    leaders, _ = start([0], store)
    # It has taken the hello, and waits for the follower's word or for rank 2.
    until(lambda: store.queue_len(HELLOS) == 0)
    kill(leaders + followers)
    assert_all_meet(store)


def test_nobody_leaves_before_all_are_done() -> None:
    """Rank 0 serves the store here, as it does without torchrun's own."""
    context = mp.get_context("fork")
    left = context.Event()
    port = free_port()
    processes = [context.Process(target=_leave, args=(rank, port, left), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0


def test_a_leader_ends_though_its_followers_have_ended_before(store) -> None:
    """Their end is told by the connections, and must not hide why the leader ends."""
    context = mp.get_context("fork")
    processes = [context.Process(target=_stop, args=(rank, store.port), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
