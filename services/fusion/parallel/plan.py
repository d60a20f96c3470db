"""How many ranks do what. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelPlan:
    """Ranks = guidance_degree x sequence_degree; neighbouring ranks share a guidance branch."""

    guidance_degree: int
    """1: both passes on every rank, one after the other. 2: prompt and negative prompt on two groups of ranks."""
    sequence_degree: int
    """Ranks that share the video tokens of a pass."""

    def __post_init__(self) -> None:
        if self.guidance_degree not in (1, 2):
            raise ValueError(f"guidance_degree must be 1 or 2, got {self.guidance_degree}")
        if self.sequence_degree < 1:
            raise ValueError(f"sequence_degree must be at least 1, got {self.sequence_degree}")

    @classmethod
    def auto(cls, world_size: int, num_heads: int) -> ParallelPlan:
        """The fastest plan: guidance first, since it needs one exchange a step, the rest to the sequence.

        Raises:
            ValueError: the rest does not divide the heads.
        """
        guidance_degree = 2 if world_size % 2 == 0 else 1
        plan = cls(guidance_degree, world_size // guidance_degree)
        plan.require_heads(num_heads)
        return plan

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.guidance_degree * self.sequence_degree

    def require_heads(self, num_heads: int) -> None:
        """Check that every rank of a sequence group gets the same number of heads.

        Raises:
            ValueError: it does not.
        """
        if num_heads % self.sequence_degree:
            legal = [degree for degree in range(1, num_heads + 1) if num_heads % degree == 0]
            raise ValueError(
                f"{self.world_size} ranks would share the sequence {self.sequence_degree} ways, but {num_heads} heads"
                f" can be shared {', '.join(map(str, legal))} ways; use another number of GPUs"
            )

    def describe(self) -> str:
        """In words, for logs and DescribeModel."""
        if self.world_size == 1:
            return "single"
        return f"guidance {self.guidance_degree} x sequence {self.sequence_degree}"

    def guidance_index(self, rank: int) -> int:
        """Which branch a rank computes: 0 the prompt, 1 the negative prompt."""
        return rank // self.sequence_degree

    def sequence_ranks(self, rank: int) -> list[int]:
        """The ranks that share this rank's pass."""
        first = self.guidance_index(rank) * self.sequence_degree
        return list(range(first, first + self.sequence_degree))

    def guidance_ranks(self, rank: int) -> list[int]:
        """The ranks that hold the same video tokens in every branch."""
        return list(range(rank % self.sequence_degree, self.world_size, self.sequence_degree))


def shard_sizes(length: int, degree: int) -> list[int]:
    """Tokens of each rank: as equal as can be, the longer ones first."""
    return [length // degree + (index < length % degree) for index in range(degree)]
