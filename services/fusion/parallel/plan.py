"""How many ranks do what. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from shared.allocations import ALLOCATIONS, RANKS_OF, degrees


@dataclass(frozen=True)
class ParallelPlan:
    """Ranks = guidance_degree x sequence_degree; neighbouring ranks share a guidance branch."""

    guidance_degree: int
    """1: both passes on every rank, one after the other. 2: prompt and negative prompt on two groups of ranks."""
    sequence_degree: int
    """Ranks that share the video tokens of a pass."""
    weights_degree: int = 1
    """Neighbouring ranks that share one copy of the weights; 1: every rank holds all of them."""

    def __post_init__(self) -> None:
        if self.guidance_degree not in (1, 2):
            raise ValueError(f"guidance_degree must be 1 or 2, got {self.guidance_degree}")
        if self.sequence_degree < 1:
            raise ValueError(f"sequence_degree must be at least 1, got {self.sequence_degree}")
        if self.weights_degree < 1 or self.world_size % self.weights_degree:
            raise ValueError(f"weights_degree must divide the {self.world_size} ranks, got {self.weights_degree}")

    @classmethod
    def auto(cls, world_size: int, num_heads: int) -> ParallelPlan:
        """The fastest plan, see shared.allocations.

        Raises:
            ValueError: the rest does not divide the heads.
        """
        plan = cls(*degrees(world_size))
        plan.require_heads(num_heads)
        return plan

    @classmethod
    def named(cls, name: str, world_size: int, num_heads: int, num_hosts: int = 1) -> ParallelPlan:
        """The plan of a name.

        Args:
            name: single, multi_2, multi_4 and multi_8 are `auto` for that many ranks; fsdp is `auto` with weights
                shared by the ranks of a host, or by all if each host has but one.
            world_size: ranks there are.
            num_heads: of the model.
            num_hosts: over which they are spread evenly; else weights are shared by all ranks.

        Raises:
            ValueError: unknown, or not for this number of ranks, or see `auto`.
        """
        if name not in ALLOCATIONS:
            raise ValueError(f"no plan is called {name!r}; there are {', '.join(ALLOCATIONS)}")
        wanted = RANKS_OF.get(name, world_size)
        if wanted != world_size:
            raise ValueError(f"the plan {name} is for {wanted} ranks, there are {world_size}; auto takes any number")
        plan = cls.auto(world_size, num_heads)
        if name != "fsdp":
            return plan
        if world_size == 1:
            raise ValueError("the plan fsdp shares the weights, which takes at least 2 ranks; there is 1")
        per_host, uneven = divmod(world_size, num_hosts)
        return replace(plan, weights_degree=world_size if uneven or per_host == 1 else per_host)

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
        shared = f", weights over {self.weights_degree}" if self.weights_degree > 1 else ""
        return f"guidance {self.guidance_degree} x sequence {self.sequence_degree}{shared}"

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


def choose_plan(
    name: str, world_size: int, num_heads: int, num_hosts: int, fits: Callable[[ParallelPlan], bool]
) -> ParallelPlan:
    """The plan of a name, where `auto` means `fsdp` if a rank's GPU lacks the memory for whole weights.

    Args:
        name: see ParallelPlan.named, as for the next two.
        world_size: see there.
        num_heads: see there.
        num_hosts: see there.
        fits: whether a rank of a plan has the memory that it takes.

    Raises:
        ValueError: see ParallelPlan.named.
    """
    plan = ParallelPlan.named(name, world_size, num_heads, num_hosts)
    if name == "auto" and world_size > 1 and not fits(plan):
        return ParallelPlan.named("fsdp", world_size, num_heads, num_hosts)
    return plan


def shard_sizes(length: int, degree: int) -> list[int]:
    """Tokens of each rank: as equal as can be, the longer ones first."""
    return [length // degree + (index < length % degree) for index in range(degree)]
