"""Steps that reuse an earlier one: where the first block does about the same, the others are taken to do so too.

First-block caching (ParaAttention) after the observation of TeaCache (arXiv 2411.19108). Lossy. Both towers, both
guidance branches and all ranks follow one decision a step, since each of them reads the others' results.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from services.fusion.model.fusion import Pass, Tokens, run_all

Agree = Callable[[torch.Tensor], torch.Tensor]
"""This rank's sums (tower, [change, size]), float32 -> those of the whole prompt's pass, the same on every rank."""


def alone(sums_22: torch.Tensor) -> torch.Tensor:
    """Agree of a process that computes whole passes."""
    return sums_22


def _plus(a: Tokens, b: Tokens) -> Tokens:
    return Tokens(*(mine + theirs for mine, theirs in zip(a, b, strict=True)))


def _minus(a: Tokens, b: Tokens) -> Tokens:
    return Tokens(*(mine - theirs for mine, theirs in zip(a, b, strict=True)))


def change_sums(new: Tokens, kept: Tokens) -> torch.Tensor:
    """Sums over each tower's values, (tower, [|new - kept|, |kept|]), float32."""

    def size(x: torch.Tensor) -> torch.Tensor:
        return x.abs().sum(dtype=torch.float32)

    return torch.stack([torch.stack([size(a - b), size(b)]) for a, b in zip(new, kept, strict=True)])


class StepCache:
    """The cache of one run; `run` is the BlockLoop of its steps.

    The first pass of a step on a rank decides: it compares what block 0 adds with what it added in the last computed
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
        """Whether the present step reuses; known after its first block."""
        self._threshold = threshold
        self._agree = agree
        self._must_compute = True
        self._first_added: Tokens | None = None
        self._rest_added: list[Tokens] = []

    def begin_step(self, *, must_compute: bool) -> None:
        """Before a step; the first step of a run must compute."""
        self._must_compute = must_compute

    def run(self, passes: list[Pass]) -> list[Tokens]:
        """The BlockLoop."""
        before, blocks = passes[0].tokens, [each.blocks for each in passes]
        first = run_all([Pass(each.tokens, islice(each.blocks, 1)) for each in passes])
        passes.clear()
        self._decide(_minus(first[0], before))
        if self.reused:
            return [_plus(tokens, added) for tokens, added in zip(first, self._rest_added, strict=True)]
        last = run_all([Pass(tokens, rest) for tokens, rest in zip(first, blocks, strict=True)])
        self._rest_added = [_minus(after, before) for after, before in zip(last, first, strict=True)]
        return last

    def _decide(self, added: Tokens) -> None:
        self.reused = not self._must_compute and self._change(added) < self._threshold
        if not self.reused:
            self._first_added = added

    def _change(self, added: Tokens) -> float:
        assert self._first_added is not None, "the first step must compute"
        change_2, size_2 = self._agree(change_sums(added, self._first_added)).unbind(1)
        # Where nothing was added the quotient is infinite or no number; neither is below a threshold.
        return float((change_2 / size_2).max())
