"""Running a coroutine so that Ctrl-C, SIGTERM and a closed terminal all clean up the same way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """The user or the system asked the command to stop, and it has cleaned up."""


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A signal cancels it; a second one cancels its clean-up too.

    Raises:
        Interrupted: it was stopped by a signal.
        Exception: whatever `work` raises.
    """
    return asyncio.run(_cancelled_by_signals(work))


async def _cancelled_by_signals(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def interrupt() -> None:
        signalled.set()
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupt)
    try:
        return await work
    except asyncio.CancelledError:
        if signalled.is_set():
            raise Interrupted from None
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
