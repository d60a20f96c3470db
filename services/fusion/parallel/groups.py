"""Process groups of a plan, and collectives on uneven shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from services.fusion.parallel.plan import ParallelPlan


@dataclass(frozen=True)
class Group:
    """A process group as this rank sees it."""

    group: dist.ProcessGroup
    index: int
    size: int

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Equal tensors of all ranks, stacked (size, ...)."""
        out = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather_into_tensor(out.view(-1), tensor.contiguous().view(-1), group=self.group)
        return out

    def gather_rows(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Rows of all ranks, in order, where rank i has sizes[i] of them."""
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:size] for part, size in zip(self.gather(padded), sizes, strict=True)])

    def exchange(self, tensor: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]) -> torch.Tensor:
        """All-to-all of the values of a contiguous tensor in pieces of these sizes, in rank order; flat."""
        out = tensor.new_empty(sum(receive_sizes))
        dist.all_to_all_single(out, tensor.view(-1), receive_sizes, send_sizes, group=self.group)
        return out


@dataclass(frozen=True)
class Groups:
    """The axes of a plan."""

    guidance: Group
    sequence: Group
    weights: DeviceMesh | None = None
    """Ranks that share the weights, or (copies, ranks that share one); None if every rank holds all of them."""


def make_groups(plan: ParallelPlan) -> Groups:
    """The groups of this rank; every rank of the default group must call it.

    Raises:
        ValueError: the plan is for another number of ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if plan.world_size != world:
        raise ValueError(f"the plan '{plan.describe()}' needs {plan.world_size} ranks, there are {world}")

    def mine(members_of: list[list[int]]) -> Group:
        found = None
        for members in members_of:
            group = dist.new_group(members)
            if rank in members:
                assert isinstance(group, dist.ProcessGroup)
                found = Group(group, members.index(rank), len(members))
        assert found is not None
        return found

    sequence = [plan.sequence_ranks(first) for first in range(0, world, plan.sequence_degree)]
    guidance = [plan.guidance_ranks(first) for first in range(plan.sequence_degree)]
    weights = None
    if plan.weights_degree > 1:
        device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
        weights = _weights_mesh(plan, device_type)
    return Groups(guidance=mine(guidance), sequence=mine(sequence), weights=weights)


def _weights_mesh(plan: ParallelPlan, device_type: str) -> DeviceMesh:
    copies = plan.world_size // plan.weights_degree
    if copies == 1:
        return init_device_mesh(device_type, (plan.weights_degree,), mesh_dim_names=("weights",))
    return init_device_mesh(device_type, (copies, plan.weights_degree), mesh_dim_names=("copies", "weights"))
