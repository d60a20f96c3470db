"""A long call of a job, carried to its end: begun again where its worker is away, fails, or dies under it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.gateway.patience import Patience
from services.gateway.workers.choosing import Wish
from services.gateway.workers.replicas import Replicas, W, WorkerCut
from shared.errors import CheckpointError, Internal, OutOfMemory, ResourceExhausted, Unavailable
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)

MAX_CUTS = 3
"""How often workers die under one stage of a job, with nothing kept in between, until the job is blamed."""
MAX_FAILURES = 3
"""At how many workers a stage of a job fails until the job is blamed; for want of memory all are asked."""


def _nothing_kept() -> int:
    return 0


@dataclass(frozen=True)
class LongCall(Generic[W, T]):
    """What is to be done."""

    job_id: str
    wish: Wish
    attempt: Callable[[W, Patience], Awaitable[T]]
    """One call of a worker; tells the patience of signs of life."""
    begin_again: Callable[[str, str], Awaitable[None]]
    """Called before another attempt after one that had begun: why, and the address of its worker."""
    kept: Callable[[], int] = _nothing_kept
    """How many steps the next attempt does not make again."""


async def carry_out(call: LongCall[W, T], replicas: Replicas[W], patience: Patience) -> T:
    """The result of a long call.

    A worker that has too little memory for it, or fails at it, is not asked again while there are others. One that is
    away, draining or full is waited for, and meanwhile the others are asked.

    Args:
        call: what is to be done.
        replicas: the workers of its stage.
        patience: how long it waits.

    Raises:
        OviError: patience has run out, no other worker is left, or workers died too often under it.
    """
    tried: list[W] = []
    cuts, kept_at_cut = 0, call.kept()
    while True:
        patience.answered = False
        try:
            worker = replicas.choose(call.wish, tried)
        except Unavailable as error:
            await patience.pause(error)
            continue
        try:
            with replicas.using(worker, call.wish, call.job_id):
                return await call.attempt(worker, patience)
        except (OutOfMemory, CheckpointError, Internal) as error:
            if worker not in tried:
                tried.append(worker)
            if not replicas.has_other(call.wish, tried):
                raise
            if not isinstance(error, OutOfMemory) and len(tried) >= MAX_FAILURES:
                raise
            log.warning("another worker is tried", stage=replicas.name, address=worker.address, reason=error.message)
            await call.begin_again(error.message, worker.address)
        except (Unavailable, ResourceExhausted) as error:
            if isinstance(error, WorkerCut) and patience.answered:
                # Going in order is the worker's own doing.
                if not replicas.is_leaving(worker):
                    cuts = 1 if call.kept() > kept_at_cut else cuts + 1
                kept_at_cut = call.kept()
                log.warning("a worker was lost during its work", stage=replicas.name, cuts=cuts, reason=error.message)
                if cuts >= MAX_CUTS:
                    what = f"the {replicas.name} service stopped {cuts} times during this job"
                    raise Unavailable(f"{what}: {error.message}") from None
                await call.begin_again(error.message, worker.address)
            await patience.pause(error)
