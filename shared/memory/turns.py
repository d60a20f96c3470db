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


def device_key(device: torch.device) -> str | None:
    """What names a device alike in every process of this host; None for a CPU, which stages share without turns."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class DeviceTurns:
    """Locks of the operating system, which lets go of them when a process dies.

    Whoever waits first holds the lock of the waiting place, so a stage that has just had its turn cannot have the next
    one before a stage that waited.
    """

    def __init__(self, key: str | None, folder: Path | None = None) -> None:
        """
        Args:
            key: of the device, see `device_key`; None: every turn can be had at once.
            folder: for the lock files, the same for all stages; None: one of the user's in the temporary folder.
        """
        self._locks = None
        if key is not None:
            folder = folder or Path(tempfile.gettempdir()) / f"ovi-turns-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
            self._locks = folder / f"{key}.next", folder / f"{key}.now"

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the device and have it within; leaving early gives up the waiting place."""
        if self._locks is None:
            yield
            return
        waiting_place, device = self._locks
        async with contextlib.AsyncExitStack() as having:
            async with _locked(waiting_place):
                await having.enter_async_context(_locked(device))
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
