"""Waiting for a worker that is away, loading or full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.gateway.metrics import GatewayMetrics
from shared.errors import OviError, ResourceExhausted, Unavailable
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class Patience:
    """How long one stage of one job waits; every sign of life from the worker starts the count anew."""

    def __init__(self, stage: str, wait_s: float, metrics: GatewayMetrics) -> None:
        """
        Args:
            stage: name of the worker.
            wait_s: seconds without a sign of life after which the job fails.
            metrics: counts the waits.
        """
        self._stage = stage
        self._wait_s = wait_s
        self._metrics = metrics
        self._since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self.answered = False
        """Whether the worker has answered since this was last set to False."""

    def alive(self) -> None:
        """The worker answered."""
        self.answered = True
        self._since_s = None
        self._pause_s = _FIRST_PAUSE_S

    async def pause(self, error: OviError) -> None:
        """Wait a little before the next try.

        Raises:
            OviError: of the kind of `error`, when patience has run out.
        """
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
            log.info("waiting for a worker", stage=self._stage, reason=error.message)
        if now_s - self._since_s >= self._wait_s:
            kind = ResourceExhausted if isinstance(error, ResourceExhausted) else Unavailable
            raise kind(f"gave up after waiting {self._wait_s:g} s: {error.message}")
        self._metrics.stage_waited(self._stage)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    async def until(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, tried again while the worker is away, loading or full.

        Raises:
            OviError: anything else that `attempt` raises, or patience has run out.
        """
        while True:
            try:
                return await attempt()
            except (Unavailable, ResourceExhausted) as error:
                await self.pause(error)
