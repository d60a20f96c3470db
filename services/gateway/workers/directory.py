"""Keeps the pools of workers in step with where their workers are, and asks each worker how it is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from services.gateway.workers.choosing import Report, WorkerState
from services.gateway.workers.registry import Registry
from services.gateway.workers.replicas import Origin, Replicas, WorkerCut, WorkerSource
from shared.errors import DeadlineExceeded, OviError, Unavailable
from shared.logging import get_logger
from shared.places import LOOKUP_S, Lookup, Name, Place, look_up
from shared.unending import unending

log = get_logger(__name__)

_ASK_S = 1.0


class Asked(Protocol):
    """A client of a worker that tells of itself."""

    @property
    def address(self) -> str: ...

    async def close(self) -> None: ...

    async def report(self) -> Report: ...


class Directory:
    """Runs beside the gateway."""

    def __init__(
        self,
        pools: Mapping[str, Replicas[Any]],
        given: Mapping[str, Sequence[Place | Name]],
        registry: Registry,
        *,
        lookup: Lookup = look_up,
        lookup_s: float = LOOKUP_S,
    ) -> None:
        """
        Args:
            pools: the workers of every stage, by its name.
            given: where they are, by the flags.
            registry: of those that register.
            lookup: of names; tests put their own in.
            lookup_s: between two lookups of a name.
        """
        self._pools = pools
        self._given = given
        self._registry = registry
        self._lookup = lookup
        self._lookup_s = lookup_s
        self._asking: dict[Asked, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        for stage, places in given.items():
            pools[stage].place(Origin(WorkerSource.ADDRESS), [one for one in places if isinstance(one, Place)])

    async def start(self) -> None:
        """Look every name up once, or try to, then go on in the background."""
        names = [(stage, one) for stage, places in self._given.items() for one in places if isinstance(one, Name)]
        await asyncio.gather(*(self._look_up(stage, name) for stage, name in names))
        follow = [partial(self._follow, stage, name) for stage, name in names]
        loops = [unending("names are looked up", one) for one in follow]
        loops.append(unending("workers are asked", self._ask_all))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """End; the pools stay as they are."""
        for task in (*self._tasks, *self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._asking.values(), return_exceptions=True)

    async def _follow(self, stage: str, name: Name) -> None:
        while True:
            await asyncio.sleep(self._lookup_s)
            await self._look_up(stage, name)

    async def _look_up(self, stage: str, name: Name) -> None:
        try:
            places = await self._lookup(name)
        except Unavailable as error:  # whoever was there is asked by itself
            log.warning("workers cannot be looked up", stage=stage, reason=error.message)
            return
        self._pools[stage].place(Origin(WorkerSource.NAME, str(name)), places)

    async def _ask_all(self) -> None:
        while True:
            self._registry.expire()
            for pool in self._pools.values():
                for worker in pool.workers:
                    if worker not in self._asking:  # one that is slow holds up nobody else
                        self._asking[worker] = asyncio.create_task(self._ask(pool, worker))
            await asyncio.sleep(_ASK_S)

    async def _ask(self, pool: Replicas[Any], worker: Asked) -> None:
        try:
            pool.note_report(worker, await worker.report())
        except WorkerCut as error:
            pool.note_silence(worker, WorkerState.UNREACHABLE, error.message)
        except DeadlineExceeded as error:
            pool.note_silence(worker, WorkerState.UNREACHABLE, error.message, is_slow=True)
        except OviError as error:
            pool.note_silence(worker, WorkerState.NOT_SERVING, error.message)
        finally:
            del self._asking[worker]
