"""The parts of the fusion model whose weights come and go together, and when each is needed.

For whoever keeps weights elsewhere: sharded over ranks, or in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import nn

from services.fusion.model.block import FusedBlock
from services.fusion.model.fusion import FusionModel, GatedConv

Modules = tuple[nn.Module, ...]
_TEXT_PARTS = ("k", "v", "norm_k")
"""Of CrossFusion: what makes a prompt's keys and values, once a job."""


@dataclass(frozen=True)
class Units:
    """Every module with weights, in exactly one unit."""

    text: Modules
    """Embedding of prompts."""
    text_blocks: tuple[Modules, ...]
    """Of each fused block, what makes keys and values of a prompt."""
    stem: Modules
    """What makes time rows, and what comes first in making tokens."""
    audio_stem: tuple[Modules, ...]
    """The rest of what makes audio tokens, layer by layer: together larger than a block."""
    blocks: tuple[Modules, ...]
    """Of each fused block, the rest."""
    heads: Modules

    @classmethod
    def of(cls, model: FusionModel) -> Units:
        """The units of a model."""
        towers = (model.video_model, model.audio_model)
        blocks = [cls.of_block(block) for block in _fused(model)]
        first, *_ = model.audio_model.patch_embedding
        return cls(
            text=tuple(tower.text_embedding for tower in towers),
            text_blocks=tuple(text for text, _ in blocks),
            stem=(
                model.video_model.patch_embedding,
                first,
                *(part for tower in towers for part in (tower.time_embedding, tower.time_projection)),
            ),
            audio_stem=tuple((layer,) for layer in _audio_stem(model)),
            blocks=tuple(rest for _, rest in blocks),
            heads=tuple(tower.head for tower in towers),
        )

    @staticmethod
    def of_block(block: FusedBlock) -> tuple[Modules, Modules]:
        """What makes keys and values of a prompt, and the rest."""
        text: list[nn.Module] = []
        rest: list[nn.Module] = []
        for half in (block.video, block.audio):
            rest += [module for name, module in half.named_children() if name != "cross_attn"]
            for name, module in half.cross_attn.named_children():
                (text if name in _TEXT_PARTS else rest).append(module)
        return tuple(text), tuple(rest)


Enter = Callable[[], None]


@dataclass(frozen=True)
class Entries:
    """What is called before anything of a unit is used; each may be called again while the unit is in use."""

    text: Enter
    text_block: Callable[[int], None]
    stem: Enter
    audio_stem: Callable[[int], None]
    block: Callable[[int], None]
    heads: Enter


def announce(model: FusionModel, entries: Entries) -> None:
    """Have the model's own entry points call `entries` from now on."""
    for tower in (model.video_model, model.audio_model):
        _before(tower.text_embedding, "forward", entries.text)
        _before(tower, "embed", entries.stem)
        _before(tower, "time_rows", entries.stem)
        _before(tower.head, "forward", entries.heads)
    for index, layer in enumerate(_audio_stem(model)):
        _before(layer, "forward", partial(entries.audio_stem, index))
    for index, block in enumerate(_fused(model)):
        for half in (block.video, block.audio):
            _before(half.cross_attn, "text_kv", partial(entries.text_block, index))
        for method in ("begin", "finish"):
            _before(block, method, partial(entries.block, index))


def _fused(model: FusionModel) -> list[FusedBlock]:
    return [cast("FusedBlock", block) for block in model.fused_blocks]


def _audio_stem(model: FusionModel) -> tuple[nn.Module, ...]:
    """In the order in which they are used."""
    *_, gated = model.audio_model.patch_embedding
    assert isinstance(gated, GatedConv)
    return gated.w1, gated.w3, gated.w2


def _before(module: nn.Module, method: str, enter: Enter) -> None:
    run = getattr(module, method)

    def enter_and_run(*args: Any, **kwargs: Any) -> Any:
        enter()
        return run(*args, **kwargs)

    setattr(module, method, enter_and_run)
