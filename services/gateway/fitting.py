"""Whether the fusion service has memory for a clip, before the clip is queued; its answer is kept for a moment."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ovi.common.v1 import system_pb2 as pb
from services.gateway.jobs.domain import ClipParameters
from shared.errors import FieldViolation, InvalidRequest, Unavailable
from shared.generation_proto import size_to_proto
from shared.memory.modes import VramMode
from shared.system_proto import vram_mode_to_proto

_FRESH_S = 5.0

AskPlan = Callable[[pb.GetPlanRequest], Awaitable[pb.MemoryPlan]]


@dataclass(frozen=True)
class _Clip:
    """What memory depends on."""

    model: str
    height: int
    width: int
    mode: VramMode


@dataclass(frozen=True)
class _Answer:
    """`refusal` is None for what may be queued."""

    refusal: InvalidRequest | None
    time_s: float


class Fitting:
    """Refuses clips that would fail for want of memory."""

    def __init__(self, ask: AskPlan) -> None:
        """
        Args:
            ask: the fusion service's GetPlan; raises OviError.
        """
        self._ask = ask
        self._answers: dict[_Clip, _Answer] = {}

    async def require(self, wanted: ClipParameters) -> None:
        """Return if the clip fits, or if the fusion service cannot say so now: the job then waits for it.

        Raises:
            InvalidRequest: it does not fit; with the numbers.
        """
        clip = _Clip(wanted.model, wanted.height, wanted.width, wanted.vram_mode)
        now_s = time.monotonic()
        answer = self._answers.get(clip)
        if answer is None or now_s - answer.time_s > _FRESH_S:
            answer = _Answer(await self._refusal(clip), now_s)
            self._answers = {key: kept for key, kept in self._answers.items() if now_s - kept.time_s <= _FRESH_S}
            self._answers[clip] = answer
        if answer.refusal is not None:
            raise answer.refusal

    async def _refusal(self, clip: _Clip) -> InvalidRequest | None:
        request = pb.GetPlanRequest(
            vram_mode=vram_mode_to_proto(clip.mode), model=clip.model, size=size_to_proto(clip.height, clip.width)
        )
        try:
            plan = await self._ask(request)
        except Unavailable:
            return None
        except InvalidRequest as error:
            return InvalidRequest([FieldViolation(f"parameters.{v.field}", v.description) for v in error.violations])
        if plan.fits:
            return None
        # Where no mode was named, none of them fits, and the clip itself is too large.
        mode_named = clip.mode is not VramMode.AUTO
        field = "parameters.vram_mode" if mode_named else "parameters.model"
        asked = clip.mode.value if mode_named else clip.model
        return InvalidRequest.of(field, f"got {asked}, which does not fit the device: {plan.explanation}")
