"""One decision of the step cache for all ranks."""

from __future__ import annotations

import torch

from services.fusion.parallel.groups import Groups
from services.fusion.sampling.step_cache import Agree, alone


def bind_agreement(groups: Groups | None) -> Agree:
    """The Agree of a plan; None if this process is alone.

    Two small gathers: sums over the ranks that share a pass, then those of the prompt's group. Every rank adds the
    same numbers in the same order, so that no rounding can part them.
    """
    if groups is None:
        return alone

    def agree(sums_22: torch.Tensor) -> torch.Tensor:
        # The audio tokens are on every rank: its sums grow by one factor, which their quotient does not show.
        if groups.sequence.size > 1:
            sums_22 = groups.sequence.gather(sums_22).sum(0)
        if groups.guidance.size > 1:
            sums_22 = groups.guidance.gather(sums_22)[0]
        return sums_22

    return agree
