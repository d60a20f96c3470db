"""Plans by name, by number of ranks and hosts, and by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from services.fusion.parallel.plan import ParallelPlan, choose_plan
from services.fusion.planner import standard_bytes
from shared.allocations import ALLOCATIONS
from shared.variants import VARIANTS
from tests.fusion_checkpoint import SMALL, write_variant


@pytest.mark.parametrize(
    ("name", "ranks", "hosts", "degrees"),
    [
        ("auto", 1, 1, (1, 1, 1)),
        ("auto", 2, 1, (2, 1, 1)),
        ("auto", 8, 1, (2, 4, 1)),
        ("auto", 3, 1, (1, 3, 1)),
        ("single", 1, 1, (1, 1, 1)),
        ("multi_2", 2, 1, (2, 1, 1)),
        ("multi_4", 4, 1, (2, 2, 1)),
        ("multi_8", 8, 2, (2, 4, 1)),
        ("fsdp", 4, 1, (2, 2, 4)),
        ("fsdp", 3, 1, (1, 3, 3)),
        ("fsdp", 16, 2, (2, 8, 8)),
        ("fsdp", 2, 2, (2, 1, 2)),
        ("fsdp", 8, 3, (2, 4, 8)),
    ],
)
def test_named(name, ranks, hosts, degrees) -> None:
    plan = ParallelPlan.named(name, ranks, 24, hosts)
    assert (plan.guidance_degree, plan.sequence_degree, plan.weights_degree) == degrees
    assert plan.world_size == ranks


@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("multi_3", 3, f"no plan is called 'multi_3'; there are {', '.join(ALLOCATIONS)}"),
        ("multi_4", 2, "the plan multi_4 is for 4 ranks, there are 2; auto takes any number"),
        ("single", 2, "the plan single is for 1 ranks, there are 2"),
        ("fsdp", 1, "at least 2 ranks"),
        ("fsdp", 10, "24 heads can be shared 1, 2, 3, 4, 6, 8, 12, 24 ways"),
    ],
)
def test_refused_with_what_is_legal(name, ranks, says) -> None:
    with pytest.raises(ValueError) as caught:
        ParallelPlan.named(name, ranks, 24)
    assert says in str(caught.value)


def test_weights_are_shared_by_all_ranks_or_by_equal_groups() -> None:
    with pytest.raises(ValueError, match="weights_degree must divide the 4 ranks, got 3"):
        ParallelPlan(2, 2, 3)
    assert ParallelPlan(2, 2, 2).describe() == "guidance 2 x sequence 2, weights over 2"


@pytest.mark.parametrize(
    ("name", "ranks", "fit", "weights_degree"),
    [
        ("auto", 4, True, 1),
        ("auto", 4, False, 4),
        ("auto", 2, False, 2),
        ("auto", 1, False, 1),
        ("multi_4", 4, False, 1),
        ("fsdp", 4, True, 4),
    ],
)
def test_auto_shares_weights_where_a_rank_cannot_hold_them(name, ranks, fit, weights_degree) -> None:
    asked = []

    def fits(plan: ParallelPlan) -> bool:
        asked.append(plan)
        return fit

    assert choose_plan(name, ranks, 24, 1, fits).weights_degree == weights_degree
    assert all(plan.weights_degree == 1 and plan.world_size == ranks for plan in asked)


def test_what_a_rank_takes_is_that_of_the_largest_variant_that_can_be_read(tmp_path) -> None:
    plan = ParallelPlan(2, 1)
    assert standard_bytes(tmp_path, torch.bfloat16, plan) == 0
    path = write_variant(tmp_path, "720x720_5s")
    small = standard_bytes(tmp_path, torch.bfloat16, plan)
    assert small > sum(tensor.nbytes for tensor in load_file(path).values())
    write_variant(tmp_path, "960x960_5s", config=replace(SMALL, num_layers=6))
    assert standard_bytes(tmp_path, torch.bfloat16, plan) > small
    (tmp_path / VARIANTS["960x960_5s"].file).write_bytes(b"damaged")
    assert standard_bytes(tmp_path, torch.bfloat16, plan) == small
    assert (
        standard_bytes(tmp_path, torch.bfloat16, ParallelPlan(2, 1, 2))
        < small
        < standard_bytes(tmp_path, torch.float32, plan)
    )
