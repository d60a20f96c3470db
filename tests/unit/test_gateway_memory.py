"""Devices and plans of several services put together, and the check before a clip is queued."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from ovi.common.v1 import system_pb2 as pb
from services.gateway import fitting
from services.gateway.fitting import Fitting
from services.gateway.jobs.domain import ClipParameters
from services.gateway.memory import StageDevices, combined_plan, host_of, merged_devices
from shared.errors import FieldViolation, InvalidRequest, OutOfMemory, Unavailable
from shared.memory.device_state import DeviceState
from shared.memory.estimate import CONTEXT
from shared.memory.modes import RECIPES, VramMode
from shared.sampling_options import SamplingOptions
from shared.system_proto import vram_mode_to_proto

FUSION, VAE, TEXT = "fusion", "vae", "text_encoder"
TURNS = [mode for mode, recipe in RECIPES.items() if recipe.takes_turns]
TOGETHER = [mode for mode in RECIPES if mode not in TURNS]


def plan(mode: VramMode, total: int, *, available: int = 100, context: int = 5, device: str = "GPU-0") -> pb.MemoryPlan:
    components = {"weights": total - context} | ({CONTEXT: context} if context else {})
    return pb.MemoryPlan(
        vram_mode=vram_mode_to_proto(mode),
        allocation="single",
        component_bytes=components,
        total_bytes=total,
        available_bytes=available,
        fits=total <= available,
        explanation=f"{total} of {available}",
        device=device,
    )


def gpu(total: int, others: int = 0) -> DeviceState:
    return DeviceState("cuda:0", "card", "GPU-0", "cuda", total, 0, 0, others)


def brute_force(plans: dict[str, pb.MemoryPlan], takes_turns: bool) -> dict[str, int]:
    """Most bytes of each device over every moment: whose turn it is, or all at once."""
    most: dict[str, int] = {}
    for busy in plans if takes_turns else [None]:
        held: dict[str, int] = {}
        for stage, one in plans.items():
            works = busy is None or stage == busy
            held[one.device] = held.get(one.device, 0) + sum(
                size for name, size in one.component_bytes.items() if works or name == CONTEXT
            )
        most = {device: max(most.get(device, 0), size) for device, size in held.items()}
    return most


@pytest.mark.parametrize("mode", [*TURNS, *TOGETHER])
@pytest.mark.parametrize("devices", list(itertools.product(["GPU-0", "GPU-1"], repeat=3)))
def test_a_stack_takes_what_its_stages_take_at_the_worst_moment(mode, devices):
    totals, contexts = (40, 31, 12), (5, 4, 3)
    plans = {
        stage: plan(mode, total, context=context, device=device)
        for stage, total, context, device in zip((FUSION, VAE, TEXT), totals, contexts, devices, strict=True)
    }
    combined = combined_plan(plans, {uuid: gpu(100) for uuid in devices})
    expected = brute_force(plans, RECIPES[mode].takes_turns)
    assert combined.total_bytes == expected[combined.device] == max(expected.values())
    assert combined.fits and combined.vram_mode == vram_mode_to_proto(mode) and combined.explanation == "40 of 100"
    assert combined.component_bytes["fusion weights"] == 35 or combined.device != devices[0]


def test_stages_that_each_fit_need_not_fit_together():
    plans = {FUSION: plan(VramMode.STANDARD, 60), VAE: plan(VramMode.STANDARD, 50)}
    for known, fits in (({"GPU-0": gpu(100)}, False), ({"GPU-0": gpu(110)}, True), ({}, True)):
        assert combined_plan(plans, known).fits is fits
    lacking = combined_plan(plans, {"GPU-0": gpu(100)})
    assert (lacking.total_bytes, lacking.available_bytes) == (110, 100)
    assert "standard takes" in lacking.explanation and "all stages together" in lacking.explanation
    plans = {FUSION: plan(VramMode.STREAMED, 60), VAE: plan(VramMode.STREAMED, 50)}
    assert combined_plan(plans, {"GPU-0": gpu(100)}).fits, "they have it one after the other"
    assert not combined_plan(plans, {"GPU-0": gpu(64)}).fits, "but the contexts stay"


def test_what_a_stage_may_use_leaves_the_other_contexts_alone():
    """As `ovi up` shares out a device of 75: all contexts first, then each stage may have the rest in its turn."""
    plans = {
        stage: plan(VramMode.STREAMED, total, available=65) for stage, total in ((FUSION, 65), (VAE, 30), (TEXT, 9))
    }
    combined = combined_plan(plans, {"GPU-0": gpu(80)})
    assert combined.fits and (combined.total_bytes, combined.available_bytes) == (75, 75)


def test_what_others_have_is_not_for_the_stack_but_its_own_contexts_are():
    plans = {FUSION: plan(VramMode.STANDARD, 60), VAE: plan(VramMode.STANDARD, 40)}
    for others, fits in ((0, True), (10, True), (11, False)):
        combined = combined_plan(plans, {"GPU-0": gpu(100, others)})
        assert combined.fits is fits and combined.available_bytes == 100 - max(0, others - 10)


def test_a_stage_that_does_not_fit_is_named():
    plans = {FUSION: plan(VramMode.STREAMED, 60), VAE: plan(VramMode.STREAMED, 50, available=40)}
    combined = combined_plan(plans, {})
    assert not combined.fits and combined.explanation == "vae: 50 of 40"


def test_a_text_encoder_on_the_cpu_takes_nothing_of_the_gpu():
    on_cpu = pb.MemoryPlan(vram_mode=pb.VRAM_MODE_ULTRA_LOW, available_bytes=1000, fits=True, device="localhost/cpu")
    plans = {FUSION: plan(VramMode.ULTRA_LOW, 7, context=1), VAE: plan(VramMode.ULTRA_LOW, 6, context=1), TEXT: on_cpu}
    assert combined_plan(plans, {}).total_bytes == 6 + 2


def unlimited(total: int, device: str = "GPU-0") -> pb.MemoryPlan:
    return pb.MemoryPlan(vram_mode=pb.VRAM_MODE_STANDARD, total_bytes=total, fits=True, device=device)


def test_what_nothing_limits_fits_unless_the_device_is_too_small():
    plans = {FUSION: unlimited(60), VAE: unlimited(50)}
    free = combined_plan(plans, {})
    assert free.fits and (free.total_bytes, free.available_bytes) == (110, 0)
    small = combined_plan(plans, {"GPU-0": gpu(100)})
    assert not small.fits and small.available_bytes == 100


def test_a_stage_that_names_no_device_shares_fusions():
    assert combined_plan({FUSION: unlimited(60), VAE: unlimited(50, "")}, {}).total_bytes == 110
    assert combined_plan({FUSION: unlimited(60), VAE: unlimited(50, "GPU-1")}, {}).total_bytes == 60


def device(name: str, uuid: str, free: int, own: int, others: int) -> DeviceState:
    return DeviceState(name, "card", uuid, "cuda" if uuid else "cpu", 100, free, own, others)


def test_devices_are_merged_by_uuid_else_by_host_and_name():
    answers = [
        StageDevices(FUSION, "a", (device("cuda:0", "GPU-0", 50, 20, 28), device("cpu", "", 70, 3, 27))),
        StageDevices(VAE, "a", (device("cuda:1", "GPU-0", 50, 10, 38), device("cpu", "", 70, 5, 25))),
        StageDevices(TEXT, "b", (device("cuda:0", "GPU-9", 90, 0, 10), device("cpu", "", 10, 1, 89))),
    ]
    merged = merged_devices(answers)
    told = {key: (one.name, one.own_bytes, one.others_bytes) for key, one in merged.items()}
    assert told == {
        "GPU-0": ("cuda:0", 30, 50 - 22 - 12),
        "a/cpu": ("cpu", 8, 22),
        "GPU-9": ("cuda:0", 0, 10),
        "b/cpu": ("cpu", 1, 89),
    }
    assert [one.uuid for one in merged.values()] == list(merged)


@pytest.mark.parametrize(
    ("address", "host"),
    [("127.0.0.1:5", "localhost"), ("localhost:5", "localhost"), ("[::1]:5", "localhost"), ("gpu-3:50052", "gpu-3")],
)
def test_loopback_is_one_host(address, host):
    assert host_of(address) == host


class Fusion:
    """Answers plans; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[pb.GetPlanRequest] = []
        self.answer: pb.MemoryPlan | Exception = plan(VramMode.STANDARD, 10)

    async def __call__(self, request: pb.GetPlanRequest) -> pb.MemoryPlan:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def clip(mode: VramMode = VramMode.AUTO, height: int = 64) -> ClipParameters:
    return ClipParameters("a cat", "", "", "tiny", height, 64, 121, SamplingOptions(), vram_mode=mode)


def refused(check: Fitting, wanted: ClipParameters) -> FieldViolation:
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(check.require(wanted))
    (violation,) = caught.value.violations
    return violation


def test_answers_are_kept_for_a_moment(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(fitting.time, "monotonic", lambda: now_s[0])
    fusion = Fusion()
    check = Fitting(fusion)
    for _ in range(3):
        asyncio.run(check.require(clip()))
    assert len(fusion.asked) == 1 and (fusion.asked[0].model, fusion.asked[0].size.height) == ("tiny", 64)
    fusion.answer = plan(VramMode.FP8, 101)
    asyncio.run(check.require(clip()))
    assert refused(check, clip(VramMode.FP8)) == FieldViolation(
        "parameters.vram_mode", "got fp8, which does not fit the device: 101 of 100"
    )
    assert refused(check, clip(height=96)).field == "parameters.model"
    assert [request.vram_mode for request in fusion.asked[1:]] == [pb.VRAM_MODE_FP8, pb.VRAM_MODE_UNSPECIFIED]
    now_s[0] += 10
    assert refused(check, clip()).field == "parameters.model", "after the moment it is asked again"
    assert len(check._answers) == 1, "old answers are not kept for ever"


def test_who_cannot_answer_refuses_nothing_and_is_not_asked_at_once_again():
    fusion = Fusion()
    fusion.answer = Unavailable("loading")
    check = Fitting(fusion)
    for _ in range(3):
        asyncio.run(check.require(clip()))
    assert len(fusion.asked) == 1


def test_what_the_fusion_service_refuses_is_said_of_the_jobs_field():
    fusion = Fusion()
    fusion.answer = InvalidRequest.of("vram_mode", "got all_gpu, which a CPU cannot do")
    assert refused(Fitting(fusion), clip(VramMode.ALL_GPU)) == FieldViolation(
        "parameters.vram_mode", "got all_gpu, which a CPU cannot do"
    )


def test_other_failures_are_told():
    fusion = Fusion()
    fusion.answer = OutOfMemory("no plan at all")
    with pytest.raises(OutOfMemory):
        asyncio.run(Fitting(fusion).require(clip()))
