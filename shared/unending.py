"""Loops that have to go on as long as their process does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from shared.logging import get_logger

log = get_logger(__name__)

PAUSE_S = 1.0


async def unending(what: str, work: Callable[[], Awaitable[None]], *, pause_s: float = PAUSE_S) -> None:
    """Do work that does not end; where something unforeseen ends it, say so and begin it again.

    Others depend on such a loop and nobody awaits it: a defect in one turn of it must not end all that follow.

    Args:
        what: it is, for the log.
        work: a loop; may also be one that ends, which then is all.
        pause_s: before it is begun again.
    """
    while True:
        try:
            return await work()
        except Exception as error:
            log.error("a loop was begun again", what=what, exc_info=error)
        await asyncio.sleep(pause_s)
