"""How several GPUs are shared, by the names that Ovi's users know, and the ranks that each takes."""

from __future__ import annotations

ALLOCATIONS = ("auto", "single", "multi_2", "multi_4", "multi_8", "fsdp")
"""auto: by the GPUs there are and their memory. fsdp: the ranks share one copy of the weights."""
RANKS_OF = {"single": 1, "multi_2": 2, "multi_4": 4, "multi_8": 8}
"""Of those that are for one number of ranks."""
RANKS_FOR_24_HEADS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Among which guidance and the heads of the released model can be shared."""
MAX_VAE_RANKS = 8
"""Beyond it the stripes of a picture are so low that most of the work is at their edges."""


def degrees(num_ranks: int) -> tuple[int, int]:
    """(ranks of different passes, ranks that share the tokens of a pass).

    Guidance first, since it needs one exchange a step; the rest to the sequence.
    """
    guidance = 2 if num_ranks % 2 == 0 else 1
    return guidance, num_ranks // guidance


def allocation_of(num_ranks: int) -> str:
    """The name for so many ranks of which each holds all weights."""
    return next((name for name, ranks in RANKS_OF.items() if ranks == num_ranks), "auto")
