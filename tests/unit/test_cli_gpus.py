"""How many GPUs a stack takes, and what torchrun is told."""

from __future__ import annotations

import sys

import pytest

from cli.errors import UsageProblem
from cli.stack.gpus import choose_gpus
from cli.stack.plan import StackOptions, plan_stack
from services.fusion.model.config import RELEASED
from services.fusion.parallel.plan import ParallelPlan


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_every_number_taken_has_a_plan(number) -> None:
    assert choose_gpus(str(number), "cpu") == number
    assert ParallelPlan.auto(number, RELEASED.num_heads).world_size == number


@pytest.mark.parametrize("wanted", ["0", "5", "7", "-1", "many", "1.5", ""])
def test_other_numbers_are_refused_with_the_legal_ones(wanted) -> None:
    with pytest.raises(UsageProblem, match=r"--gpus: got .*1, 2, 3, 4, 6, 8, 12, 16, 24"):
        choose_gpus(wanted, "cpu")


def test_auto_without_gpus_is_one() -> None:
    assert choose_gpus("auto", "cpu") == 1


def test_one_named_device_cannot_be_several() -> None:
    with pytest.raises(UsageProblem, match="--device cuda:1"):
        choose_gpus("2", "cuda:1")


@pytest.mark.parametrize("gpus", [1, 4])
def test_only_fusion_is_started_by_torchrun(tmp_path, gpus) -> None:
    plan = plan_stack(StackOptions(tmp_path, tmp_path, grpc_port=0, http_port=0, gpus=gpus))
    plan.close()
    for service in (*plan.stages, plan.gateway):
        several = service.name == "fusion" and gpus > 1
        assert service.command[:2] == (sys.executable, "-P")
        assert ("torch.distributed.run" in service.command) == several
        if several:
            assert service.command[service.command.index("--nproc-per-node") + 1] == str(gpus)
