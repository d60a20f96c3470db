"""How many GPUs a stack takes, which, how much of them, and what torchrun is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cli.errors import UsageProblem
from cli.stack.gpus import choose_gpus, choose_vae_gpus, gpus_for, look_at_gpus, parse_mode, require_plan, usable
from cli.stack.memory import DeviceFlags, check_flags, choose_devices
from cli.stack.plan import ServiceSpec, StackOptions, plan_stack
from services.fusion.model.config import RELEASED
from services.fusion.parallel.plan import ParallelPlan
from shared.errors import OutOfMemory
from shared.memory.choose import DeviceFacts

GIB = 2**30


def cards(*free_gib: float) -> tuple[DeviceFacts, ...]:
    """GPUs of which so much is free."""
    return tuple(
        DeviceFacts(f"cuda:{index}", int(free * GIB), int(free * GIB), "9.0", unified=False)
        for index, free in enumerate(free_gib)
    )


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_every_number_taken_has_a_plan(number) -> None:
    assert choose_gpus(str(number), "cpu", "auto", ()) == number
    assert ParallelPlan.auto(number, RELEASED.num_heads).world_size == number


@pytest.mark.parametrize("wanted", ["0", "5", "7", "-1", "many", "1.5", ""])
def test_other_numbers_are_refused_with_the_legal_ones(wanted) -> None:
    with pytest.raises(UsageProblem, match=r"--gpus: got .*1, 2, 3, 4, 6, 8, 12, 16, 24"):
        choose_gpus(wanted, "cpu", "auto", ())


def test_auto_without_gpus_is_one() -> None:
    assert choose_gpus("auto", "cpu", "auto", ()) == 1
    assert choose_gpus("auto", "auto", "auto", cards(80, 80)) is None, "the memory decides"


def test_one_named_device_cannot_be_several() -> None:
    with pytest.raises(UsageProblem, match="--device cuda:1"):
        choose_gpus("2", "cuda:1", "auto", cards(80, 80))


@pytest.mark.parametrize("number", range(1, 9))
def test_the_vae_takes_any_number_up_to_8(number) -> None:
    assert choose_vae_gpus(str(number), "cpu", ()) == number


@pytest.mark.parametrize("wanted", ["0", "9", "many"])
def test_other_numbers_for_the_vae_are_refused(wanted) -> None:
    with pytest.raises(UsageProblem, match=r"--vae-gpus: got .*1 to 8"):
        choose_vae_gpus(wanted, "cpu", ())


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
        if "shared.group.launch" in service.command:
            started[service.name] = int(service.command[service.command.index("--nproc-per-node") + 1])
    assert started == ranks


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
    assert choose_gpus(gpus, "cpu", plan, ()) == number
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
        choose_gpus(gpus, device, plan, cards(80) if device != "cpu" else ())
    assert says in str(caught.value)


def test_plans_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UsageProblem, match="--plan: got 'multi_3', allowed is one of auto, single"):
        require_plan("multi_3")
    for flags, said in (
        (DeviceFlags("cpu", gpus="2", vram_mode="fp8"), "--vram-mode fp8 is for one GPU, got --gpus 2; with several"),
        (DeviceFlags(plan="multi_4", vram_mode="streamed"), "--vram-mode streamed is for one GPU, got --plan multi_4"),
        (DeviceFlags(vae_gpus="2", vram_mode="streamed"), "--vram-mode streamed is for one GPU, got --vae-gpus 2"),
        (DeviceFlags(plan="fsdp", vram_mode="ultra_low"), "--vram-mode ultra_low is for one GPU, got --plan fsdp"),
    ):
        with pytest.raises(UsageProblem, match=said):
            check_flags(flags, cards(80, 80, 80, 80))


def test_modes_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UsageProblem, match="--vram-mode: got 'tiny', allowed is one of auto, standard, fp8, "):
        parse_mode("tiny")
    for gpus, device in (((), "auto"), (cards(80), "cpu")):
        with pytest.raises(UsageProblem, match="--vram-mode all_gpu needs a GPU"):
            check_flags(DeviceFlags(device, vram_mode="all_gpu"), gpus)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert [gpu.name for gpu in usable(cards(8, 9, 10), "cuda:1")] == ["cuda:1"]
    assert gpus_for("cpu") == ()
    with pytest.raises(UsageProblem, match=r"--device cuda:3: this machine has cuda:0, cuda:1$"):
        usable(cards(8, 8), "cuda:3")
    with pytest.raises(UsageProblem, match="--device cuda: this machine has no GPU that PyTorch can use"):
        usable((), "cuda")


def test_gpus_are_looked_at_in_a_process_of_its_own() -> None:
    assert [gpu.name for gpu in look_at_gpus()] == [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def started(
    folder: Path, flags: DeviceFlags, gpus: tuple[DeviceFacts, ...]
) -> tuple[dict[str, ServiceSpec], list[str]]:
    """The services that these flags lead to, with released weights; and what was said."""
    said: list[str] = []
    choice = choose_devices(flags, gpus, folder, said.append)
    plan = plan_stack(StackOptions(folder, folder, grpc_port=0, http_port=0, **vars(choice)))
    plan.close()
    return {service.name: service for service in plan.stages}, said


def flag(service: ServiceSpec, name: str) -> str | None:
    return service.command[service.command.index(name) + 1] if name in service.command else None


def test_without_gpus_nothing_is_limited(tmp_path) -> None:
    stages, said = started(tmp_path, DeviceFlags("cpu"), ())
    assert {flag(stage, "--vram-mode") for stage in stages.values()} == {"standard"}
    assert {flag(stage, "--memory-gib") for stage in stages.values()} == {None}
    assert said == []
    stages, _ = started(tmp_path, DeviceFlags("cpu", vram_mode="ultra_low"), ())
    assert {flag(stage, "--vram-mode") for stage in stages.values()} == {"ultra_low"}


def test_stages_that_take_turns_may_each_use_what_there_is(tmp_path) -> None:
    stages, said = started(tmp_path, DeviceFlags(), cards(7, 23))
    assert {flag(stage, "--device") for stage in stages.values()} == {"cuda:1"}, "the one with more free memory"
    assert {flag(stage, "--vram-mode") for stage in stages.values()} == {"streamed"}
    (budget,) = {flag(stage, "--memory-gib") for stage in stages.values()}
    assert 19 < float(budget or 0) <= 23 * 0.98 - 2
    assert len(said) == 1 and said[0].startswith("streamed on cuda:1, lossless weights, stages take turns")


def test_stages_that_are_there_together_share_what_there_is(tmp_path) -> None:
    stages, said = started(tmp_path, DeviceFlags(), cards(139))
    assert {flag(stage, "--vram-mode") for stage in stages.values()} == {"all_gpu"}
    budgets = {name: float(flag(stage, "--memory-gib") or 0) for name, stage in stages.items()}
    assert sum(budgets.values()) <= 139 * 0.98 - 1.5
    assert budgets["fusion"] > 26 and budgets["vae"] > 16 and budgets["text_encoder"] > 11
    assert said[0].startswith("all_gpu on cuda:0, lossless weights, everything stays on the device")


def test_a_text_encoder_on_the_cpu_has_no_budget(tmp_path) -> None:
    for flags in (DeviceFlags(vram_mode="ultra_low"), DeviceFlags(text_encoder_device="cpu")):
        stages, _ = started(tmp_path, flags, cards(31))
        assert flag(stages["text_encoder"], "--device") == "cpu"
        assert flag(stages["text_encoder"], "--memory-gib") is None
        assert flag(stages["fusion"], "--memory-gib") is not None
    stages, _ = started(tmp_path, DeviceFlags("cuda:0", text_encoder_device="cuda:1"), cards(31, 31))
    assert flag(stages["text_encoder"], "--device") == "cuda:1"
    assert flag(stages["text_encoder"], "--memory-gib") is None


def test_a_text_encoder_that_was_put_on_a_gpu_leaves_less_of_it(tmp_path) -> None:
    flags = DeviceFlags("cuda:0", text_encoder_device="cuda:0", vram_mode="standard")
    stages, _ = started(tmp_path, flags, cards(55))
    assert float(flag(stages["fusion"], "--memory-gib") or 0) + float(flag(stages["vae"], "--memory-gib") or 0) < 44
    with pytest.raises(OutOfMemory, match=r"standard needs 2\d\.\d GiB on cuda:0 for \w+, 2\d\.\d GiB may be used"):
        started(tmp_path, flags, cards(40))


def test_of_several_gpus_those_that_are_used_are_shown(tmp_path, monkeypatch) -> None:
    stages, _ = started(tmp_path, DeviceFlags(), cards(8, 139, 139))
    assert flag(stages["fusion"], "--nproc-per-node") == "2" and flag(stages["fusion"], "--plan") == "multi_2"
    assert {flag(stage, "--device") for stage in stages.values()} == {"cuda"}
    assert {stage.environment["CUDA_VISIBLE_DEVICES"] for stage in stages.values()} == {"1,2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-3")
    stages, _ = started(tmp_path, DeviceFlags(), cards(8, 139, 139))
    assert {stage.environment["CUDA_VISIBLE_DEVICES"] for stage in stages.values()} == {"5,GPU-3"}
    stages, _ = started(tmp_path, DeviceFlags(), cards(139, 139))
    assert all("CUDA_VISIBLE_DEVICES" not in stage.environment for stage in stages.values())


def test_what_does_not_fit_is_refused_with_the_numbers(tmp_path) -> None:
    with pytest.raises(
        OutOfMemory, match=r"^standard needs 2\d\.\d GiB on cuda:0 for \w+, 15\.7 GiB may be used; streamed"
    ):
        started(tmp_path, DeviceFlags(vram_mode="standard"), cards(16))
    with pytest.raises(
        OutOfMemory, match=r"^ultra_low needs \d\.\d GiB on cuda:0 for 720x720_5s, 2\.9 GiB may be used"
    ):
        started(tmp_path, DeviceFlags(), cards(3))


def test_a_text_encoder_that_gives_way_is_streamed_while_the_others_stay(tmp_path) -> None:
    stages, said = started(tmp_path, DeviceFlags(), cards(46))
    modes = {name: flag(stage, "--vram-mode") for name, stage in stages.items()}
    assert modes == {"text_encoder": "streamed", "fusion": "standard", "vae": "standard"}
    assert "but the text encoder" in said[0]
