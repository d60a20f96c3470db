"""Hears what other replicas of the gateway say through PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import sqlalchemy as sa

from services.gateway.jobs.signals import CHANNEL, Signal
from shared.errors import OviError
from shared.logging import get_logger
from shared.unending import unending

log = get_logger(__name__)

_RETRY_S = 1.0


class Listener:
    """Passes on signals of other replicas; comes back by itself when the database was away."""

    def __init__(self, url: sa.URL, own_id: str, hear: Callable[[Signal], Awaitable[None]]) -> None:
        """
        Args:
            url: of the database.
            own_id: executor id of this replica, whose own signals are left out.
            hear: is told of each signal.
        """
        self._address = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._own_id = own_id
        self._hear = hear
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(unending("signals are heard", self._listen))

    async def stop(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _listen(self) -> None:
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(self._address, autocommit=True, connect_timeout=5)
                async with connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    async for notification in connection.notifies():
                        await self._pass_on(notification.payload)
            except psycopg.Error as error:
                log.warning("signals of other replicas are not heard", reason=str(error))
            await asyncio.sleep(_RETRY_S)

    async def _pass_on(self, text: str) -> None:
        try:
            signal = Signal.from_text(text)
            if signal.sender != self._own_id:
                await self._hear(signal)
        except (ValueError, OviError) as error:
            log.warning("a signal was lost", payload=text[:200], reason=str(error))
