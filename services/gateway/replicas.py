"""Equal workers of one stage: which of them gets a call, and which is left alone for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from shared.errors import OviError, Unavailable

_SHUNNED_S = 5.0
"""How long a worker that was away is passed over while there are others."""


class Worker(Protocol):
    """A client of one worker."""

    @property
    def name(self) -> str: ...


W = TypeVar("W", bound=Worker)
T = TypeVar("T")


class Replicas(Generic[W]):
    """At least one worker of a stage. All of them have the same models."""

    def __init__(self, workers: Sequence[W]) -> None:
        if not workers:
            raise ValueError("a stage needs at least one worker")
        self.workers = tuple(workers)
        self.name = workers[0].name
        """Of the stage."""
        self._busy = [0] * len(workers)
        self._given = [0] * len(workers)
        self._away_s = [float("-inf")] * len(workers)

    def choose(self, avoid: W | None = None) -> W:
        """The worker with the least work of this gateway; `avoid`, or one that was just away, if there is no other."""
        now_s = time.monotonic()

        def rank(index: int) -> tuple[bool, bool, int, int]:
            shunned = now_s - self._away_s[index] < _SHUNNED_S
            return self.workers[index] is avoid, shunned, self._busy[index], self._given[index]

        return self.workers[min(range(len(self.workers)), key=rank)]

    @contextmanager
    def using(self, worker: W) -> Iterator[None]:
        """Around a call: the worker is busy with it, and passed over for a while if it turns out to be away."""
        index = self.workers.index(worker)
        self._busy[index] += 1
        self._given[index] += 1
        try:
            yield
        except Unavailable:
            self._away_s[index] = time.monotonic()
            raise
        finally:
            self._busy[index] -= 1

    async def on_one(self, call: Callable[[W], Awaitable[T]]) -> T:
        """The result of a call of one worker.

        Raises:
            OviError: what the call raises.
        """
        worker = self.choose()
        with self.using(worker):
            return await call(worker)

    async def of_any(self, ask: Callable[[W], Awaitable[T]]) -> T:
        """The first answer to a question that any of the workers can answer.

        Raises:
            OviError: all failed; that of the first to fail.
        """
        asked = [asyncio.ensure_future(ask(worker)) for worker in self.workers]
        errors = []
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    return await answer
                except OviError as error:
                    errors.append(error)
            raise errors[0]
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def of_all(self, ask: Callable[[W], Awaitable[T]]) -> list[T]:
        """What the workers answer to a question, in order; those that fail are left out.

        Raises:
            OviError: all failed; that of the first.
        """
        results = await asyncio.gather(*(ask(worker) for worker in self.workers), return_exceptions=True)
        if unexpected := [one for one in results if isinstance(one, BaseException) and not isinstance(one, OviError)]:
            raise unexpected[0]
        answers = [one for one in results if not isinstance(one, BaseException)]
        if not answers:
            assert isinstance(results[0], OviError)
            raise results[0]
        return answers
