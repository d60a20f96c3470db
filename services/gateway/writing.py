"""Files are written in threads, and never half-way when a job is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


async def write_unbroken(write: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Write files in a thread. A cancel waits for it, so that no file appears after a job's folder was deleted."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *args, **kwargs))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        writing.exception()
        raise
