"""Steps that reuse an earlier one: where the first block does about the same, the others are taken to do so too.

First-block caching (ParaAttention) after the observation of TeaCache (arXiv 2411.19108). Lossy. Both towers, both
guidance branches and all ranks follow one decision a step, since each of them reads the others' results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from services.fusion.model.fusion import BlockCall, run_all

Agree = Callable[[torch.Tensor], torch.Tensor]
"""This rank's sums (tower, [change, size]), float32 -> those of the whole prompt's pass, the same on every rank."""


def alone(sums_22: torch.Tensor) -> torch.Tensor:
    """Agree of a process that computes whole passes."""
    return sums_22


class Tokens(NamedTuple):
    """Tokens of both towers, or what some blocks add to them."""

    video_TD: torch.Tensor
    audio_SD: torch.Tensor

    def plus(self, other: Tokens) -> Tokens:
        """The sum."""
        return Tokens(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: Tokens) -> Tokens:
        """The difference."""
        return Tokens(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def change_sums(new: Tokens, kept: Tokens) -> torch.Tensor:
    """Sums over each tower's values, (tower, [|new - kept|, |kept|]), float32."""

    def size(x: torch.Tensor) -> torch.Tensor:
        return x.abs().sum(dtype=torch.float32)

    return torch.stack([torch.stack([size(a - b), size(b)]) for a, b in zip(new, kept, strict=True)])


class StepCache:
    """The cache of one run; `run_prompt` and `run_negative` are the BlockLoops of its passes.

    The first pass of a step on a rank decides. It compares what block 0 adds with what it added in the last computed
    step, not in the step before: that is the step whose other blocks would be reused, and the distance from it grows
    with every reuse, so no sum over steps is needed.
    """

    def __init__(self, threshold: float, agree: Agree = alone) -> None:
        """
        Args:
            threshold: relative L1 change of what block 0 adds, in the tower that changed more, below which a step
                reuses; above 0.
            agree: called on all ranks in every step that may reuse.
        """
        self.reused = False
        """Whether the present step reuses; known after its first pass."""
        self._threshold = threshold
        self._agree = agree
        self._must_compute = True
        self._decided = False
        self._first_added: Tokens | None = None
        self._rest_added: dict[str, Tokens] = {}

    def begin_step(self, *, must_compute: bool) -> None:
        """Before the passes of a step; the first step of a run must compute."""
        self._must_compute, self._decided = must_compute, False

    def run_prompt(
        self, blocks: Sequence[BlockCall], video_TD: torch.Tensor, audio_SD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """BlockLoop of the prompt's pass."""
        return self._run("prompt", blocks, Tokens(video_TD, audio_SD))

    def run_negative(
        self, blocks: Sequence[BlockCall], video_TD: torch.Tensor, audio_SD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """BlockLoop of the negative pass."""
        return self._run("negative", blocks, Tokens(video_TD, audio_SD))

    def _run(self, branch: str, blocks: Sequence[BlockCall], tokens: Tokens) -> Tokens:
        first = Tokens(*blocks[0](*tokens))
        if not self._decided:
            self._decide(first.minus(tokens))
        if self.reused:
            return first.plus(self._rest_added[branch])
        last = Tokens(*run_all(blocks[1:], *first))
        self._rest_added[branch] = last.minus(first)
        return last

    def _decide(self, added: Tokens) -> None:
        self.reused = not self._must_compute and self._change(added) < self._threshold
        self._decided = True
        if not self.reused:
            self._first_added = added

    def _change(self, added: Tokens) -> float:
        assert self._first_added is not None, "the first step must compute"
        change_2, size_2 = self._agree(change_sums(added, self._first_added)).unbind(1)
        # Where nothing was added the quotient is infinite or no number; neither is below a threshold.
        return float((change_2 / size_2).max())
