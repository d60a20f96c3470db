"""How many GPUs a stack takes, and what torchrun is told."""

from __future__ import annotations

import sys

import pytest

from cli.errors import UsageProblem
from cli.stack.gpus import PLANS, choose_gpus, choose_vae_gpus, require_plan
from cli.stack.plan import StackOptions, plan_stack
from services.fusion.model.config import RELEASED
from services.fusion.parallel.plan import PLAN_NAMES, ParallelPlan


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


@pytest.mark.parametrize("number", range(1, 9))
def test_the_vae_takes_any_number_up_to_8(number) -> None:
    assert choose_vae_gpus(str(number), "cpu") == number


@pytest.mark.parametrize("wanted", ["0", "9", "many"])
def test_other_numbers_for_the_vae_are_refused(wanted) -> None:
    with pytest.raises(UsageProblem, match=r"--vae-gpus: got .*1 to 8"):
        choose_vae_gpus(wanted, "cpu")


@pytest.mark.parametrize(
    ("gpus", "vae_gpus", "device", "ranks"),
    [
        (1, None, "auto", {}),
        (4, None, "auto", {"fusion": 4, "vae": 4}),
        (16, None, "cuda", {"fusion": 16, "vae": 8}),
        (4, 1, "cuda", {"fusion": 4}),
        (1, 3, "cuda", {"vae": 3}),
        (2, None, "cpu", {"fusion": 2}),
    ],
)
def test_torchrun_starts_what_has_several_ranks(tmp_path, gpus, vae_gpus, device, ranks) -> None:
    options = StackOptions(tmp_path, tmp_path, grpc_port=0, http_port=0, device=device, gpus=gpus, vae_gpus=vae_gpus)
    plan = plan_stack(options)
    plan.close()
    started = {}
    for service in (*plan.stages, plan.gateway):
        assert service.command[:2] == (sys.executable, "-P")
        if "torch.distributed.run" in service.command:
            started[service.name] = int(service.command[service.command.index("--nproc-per-node") + 1])
    assert started == ranks


def test_the_command_knows_the_plans_of_the_service() -> None:
    assert PLANS == PLAN_NAMES


@pytest.mark.parametrize(
    ("plan", "gpus", "number"),
    [
        ("single", "auto", 1),
        ("multi_4", "auto", 4),
        ("multi_8", "8", 8),
        ("auto", "6", 6),
        ("fsdp", "3", 3),
    ],
)
def test_a_plan_says_how_many(tmp_path, plan, gpus, number) -> None:
    assert choose_gpus(gpus, "cpu", plan) == number
    stack = plan_stack(StackOptions(tmp_path, tmp_path, grpc_port=0, http_port=0, gpus=number, plan=plan))
    stack.close()
    (fusion,) = (service for service in stack.stages if service.name == "fusion")
    assert fusion.command[fusion.command.index("--plan") + 1] == plan


@pytest.mark.parametrize(
    ("plan", "gpus", "device", "says"),
    [
        ("multi_4", "2", "cpu", "--plan multi_4 is for 4 GPUs, got --gpus 2"),
        ("single", "4", "cpu", "--plan single is for 1 GPUs, got --gpus 4"),
        ("multi_2", "auto", "cuda:0", "--plan multi_2 2 needs --device auto or cuda"),
        ("fsdp", "1", "cpu", "--plan fsdp shares the weights among at least 2 GPUs"),
        ("fsdp", "auto", "cpu", "--plan fsdp shares the weights among at least 2 GPUs"),
    ],
)
def test_contradictions_are_refused(plan, gpus, device, says) -> None:
    with pytest.raises(UsageProblem) as caught:
        choose_gpus(gpus, device, plan)
    assert says in str(caught.value)


def test_plans_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UsageProblem, match="--plan: got 'multi_3', allowed is one of auto, single"):
        require_plan("multi_3", "none")
    with pytest.raises(UsageProblem, match="--plan fsdp needs --quantization none, got fp8"):
        require_plan("fsdp", "fp8")
    assert require_plan("auto", "fp8") == "auto"
