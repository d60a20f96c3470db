"""Turns on a device: in modes that take turns, one stage of this host at a time has it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import torch

_POLL_S = 0.02
"""Between two looks; `flock` tells nobody when a lock is free."""


def device_key(device: torch.device) -> str:
    """What names a device alike in every process of this host."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)


class DeviceTurns:
    """Locks of the operating system, which lets go of them when a process dies.

    Whoever waits first holds the lock of the waiting place, so a stage that has just had its turn cannot have the next
    one before a stage that waited.
    """

    def __init__(self, key: str, folder: Path | None = None) -> None:
        """
        Args:
            key: of the device, see `device_key`.
            folder: for the lock files, the same for all stages; None: one of the user's in the temporary folder.
        """
        folder = folder or Path(tempfile.gettempdir()) / f"ovi-turns-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._next, self._now = (folder / f"{key}.{name}" for name in ("next", "now"))

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the device and have it within; leaving early gives up the waiting place."""
        async with contextlib.AsyncExitStack() as having:
            async with contextlib.AsyncExitStack() as waiting:
                await waiting.enter_async_context(_locked(self._next))
                await having.enter_async_context(_locked(self._now))
            yield


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    with path.open("a") as file:
        while not _try_lock(file.fileno()):
            await asyncio.sleep(_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
