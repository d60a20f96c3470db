"""Turns on a device: one at a time over processes, in the order of asking, given up by who dies or no longer waits."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest
import torch

from shared.memory.turns import DeviceTurns, device_key

HOLD = """
import asyncio, sys
from pathlib import Path
from shared.memory.turns import DeviceTurns

async def hold():
    async with DeviceTurns("gpu", Path(sys.argv[1])).turn():
        print("mine", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""
BOUND_S = 30


async def reach(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), BOUND_S)


def test_one_at_a_time_and_who_waited_is_before_who_comes_again(tmp_path) -> None:
    """Two stages, each with its own object as in two processes: flock is by open file."""
    order = []

    async def scenario() -> None:
        first, second = (DeviceTurns("gpu", tmp_path) for _ in range(2))
        begun = asyncio.Event()

        async def other() -> None:
            begun.set()
            async with second.turn():
                order.append("second")

        async with first.turn():
            waiting = asyncio.create_task(other())
            await reach(begun)
            # The waiting place is taken when somebody else cannot have it.
            while not await taken(tmp_path / "gpu.next"):
                await asyncio.sleep(0)
            order.append("first")
        async with first.turn():
            order.append("first again")
        await asyncio.wait_for(waiting, BOUND_S)

    asyncio.run(scenario())
    assert order == ["first", "second", "first again"]


async def taken(path) -> bool:
    import fcntl

    await asyncio.sleep(0)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_killed_process_gives_its_turn_up(tmp_path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"

        async def scenario() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2), DeviceTurns("gpu", tmp_path).turn():
                    raise AssertionError("two at a time")
            process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(BOUND_S), DeviceTurns("gpu", tmp_path).turn():
                pass

        asyncio.run(scenario())


def test_devices_do_not_wait_for_each_other_and_a_cpu_for_nobody(tmp_path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(BOUND_S), DeviceTurns("a", tmp_path).turn(), DeviceTurns("b", tmp_path).turn():
            pass
        key = device_key(torch.device("cpu"))
        async with asyncio.timeout(BOUND_S), DeviceTurns(key, tmp_path).turn(), DeviceTurns(key, tmp_path).turn():
            pass

    asyncio.run(scenario())
