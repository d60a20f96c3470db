"""Which variants can be made, as the fusion service tells it; kept for a moment."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from shared.errors import InvalidRequest, Unavailable
from shared.logging import get_logger
from shared.memory.modes import VramMode
from shared.variants import VARIANTS, PromptFormat

log = get_logger(__name__)

_FRESH_S = 5.0


@dataclass(frozen=True)
class ModelInfo:
    """A variant whose file the fusion service has."""

    id: str
    sizes: tuple[tuple[int, int], ...]
    """Common legal (height, width)."""
    video_area: int
    """Pixels of a frame before rounding."""
    num_frames: int
    fps: int
    num_layers: int
    """Fused blocks."""
    prompt_format: PromptFormat
    precision: str
    device: str
    fingerprint: str
    """Of the weight file."""
    problem: str = ""
    """Why it cannot be run, in the fusion service's words; the fields above but the id are then empty."""
    vram_mode: VramMode = VramMode.AUTO
    """How the fusion service uses device memory at present; AUTO where it does not say."""


def runnable(models: Mapping[str, ModelInfo]) -> dict[str, ModelInfo]:
    """Those without a problem, in order."""
    return {model.id: model for model in models.values() if not model.problem}


def merged_models(answers: Sequence[Sequence[ModelInfo]]) -> tuple[ModelInfo, ...]:
    """The variants of several services, those that one of them can run first; in the order in which they are released.

    Args:
        answers: what each service has.
    """
    merged: dict[str, ModelInfo] = {}
    for model in (model for answer in answers for model in answer):
        known = merged.get(model.id)
        if known is None or (known.problem and not model.problem):
            merged[model.id] = model
        elif not model.problem and model.fingerprint != known.fingerprint:
            log.warning("services have different files of one variant", model=model.id)
    order = list(VARIANTS)

    def place(model: ModelInfo) -> tuple[bool, int]:
        return bool(model.problem), order.index(model.id) if model.id in order else len(order)

    return tuple(sorted(merged.values(), key=place))


class ModelCatalog:
    """The variants, those that can be run first; asked for again when the answer is a few seconds old."""

    def __init__(self, describe: Callable[[], Awaitable[tuple[ModelInfo, ...]]]) -> None:
        """
        Args:
            describe: asks the fusion service; raises OviError.
        """
        self._describe = describe
        self._models: tuple[ModelInfo, ...] = ()
        self._asked_s = float("-inf")
        self._missed_s = float("-inf")

    async def current(self) -> Mapping[str, ModelInfo]:
        """The variants now, by id, in order.

        Raises:
            Unavailable: the fusion service is away or loading.
        """
        if time.monotonic() - self._asked_s > _FRESH_S:
            self._models = await self._describe()
            self._asked_s = time.monotonic()
        return {model.id: model for model in self._models}

    async def last_known(self) -> Mapping[str, ModelInfo]:
        """The variants now, or as they were when the fusion service last answered: a job may wait for it to be back.

        Raises:
            Unavailable: the fusion service never answered.
        """
        known = {model.id: model for model in self._models}
        if known and time.monotonic() - self._missed_s < _FRESH_S:
            return known
        try:
            return await self.current()
        except Unavailable:
            if not known:
                raise
            self._missed_s = time.monotonic()
            return known

    async def get(self, model_id: str) -> ModelInfo:
        """One variant.

        Raises:
            InvalidRequest: it cannot be run any more.
            Unavailable: the fusion service is away or loading.
        """
        models = await self.current()
        model = models.get(model_id)
        if model is None or model.problem:
            legal = ", ".join(runnable(models)) or "none"
            raise InvalidRequest.of("model", f"{model_id!r} cannot be run any more, allowed is {legal}")
        return model
