"""Memory modes of the fusion engine: the same latents, refusals with numbers, switching, memory that runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.fusion.engine import FusionEngine, ModeLowered
from services.fusion.ops import Execution
from services.fusion.planner import fusion_sizes, largest_clip
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents, StepDone
from shared.errors import InvalidRequest, OutOfMemory
from shared.memory.choose import plan_fusion
from shared.memory.modes import RECIPES, VramMode, WeightFormat
from shared.sampling_options import SamplingOptions
from tests.fusion_checkpoint import SMALL, write_variant

CPU = torch.device("cpu")
MODEL, OTHER = "720x720_5s", "960x960_5s"
OPTIONS = SamplingOptions(num_inference_steps=2, slg_layer=1, seed=7)
SPEC = RunSpec(MODEL, 64, 64, OPTIONS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    write_variant(folder, MODEL, seed=1)
    write_variant(folder, OTHER, seed=2)
    return folder


def make(checkpoints: Path, mode: VramMode, memory_bytes: int | None = None, **more) -> FusionEngine:
    engine = FusionEngine(checkpoints, CPU, torch.float32, vram_mode=mode, memory_bytes=memory_bytes, **more)
    engine.discover()
    return engine


def inputs() -> RunInputs:
    generator = torch.Generator().manual_seed(3)
    return RunInputs(*(torch.randn(6, SMALL.text_dim, generator=generator) for _ in range(3)), None)


def run(engine: FusionEngine, spec: RunSpec = SPEC) -> Latents:
    *_, latents = engine.denoise(spec, inputs())
    assert isinstance(latents, Latents)
    return latents


def same(a: Latents, b: Latents) -> bool:
    return torch.equal(a.video_CFHW, b.video_CFHW) and torch.equal(a.audio_SC, b.audio_SC)


def drift(a: Latents, b: Latents) -> float:
    return float((a.video_CFHW - b.video_CFHW).norm() / b.video_CFHW.norm())


def need(engine: FusionEngine, mode: VramMode) -> int:
    """Least bytes of a mode."""
    return engine.planner.least(engine.served[MODEL], mode).components.reserved


def test_streaming_changes_no_bit_and_formats_change_little(checkpoints) -> None:
    standard = run(make(checkpoints, VramMode.STANDARD))
    assert same(run(make(checkpoints, VramMode.STREAMED)), standard)
    fp8 = run(make(checkpoints, VramMode.FP8))
    assert same(run(make(checkpoints, VramMode.FP8_OFFLOAD)), fp8)
    resident_fp8 = run(make(checkpoints, VramMode.STANDARD, execution=Execution(weights=WeightFormat.FP8)))
    assert same(resident_fp8, fp8)
    int8 = run(make(checkpoints, VramMode.ULTRA_LOW))
    assert 0 < drift(int8, standard) < drift(fp8, standard) < 0.2


def test_a_job_may_have_another_mode_and_the_engine_keeps_its_own(checkpoints) -> None:
    engine = make(checkpoints, VramMode.STANDARD)
    before = run(engine)
    ultra_low = run(engine, replace(SPEC, vram_mode=VramMode.ULTRA_LOW))
    assert not same(before, ultra_low)
    assert engine.mode is VramMode.STANDARD
    assert same(run(engine), before)


def test_mode_and_variant_are_switched_there_and_back(checkpoints) -> None:
    engine = make(checkpoints, VramMode.STANDARD)
    expected = {model: run(engine, replace(SPEC, model=model)) for model in (MODEL, OTHER)}
    for mode, model in ((VramMode.STREAMED, OTHER), (VramMode.STREAMED, MODEL), (VramMode.STANDARD, OTHER)):
        plan = engine.set_mode(mode, model)
        assert (engine.mode, engine.loaded_id, plan.mode) == (mode, model, mode)
        assert same(run(engine, replace(SPEC, model=model)), expected[model])


def test_auto_is_lossless_as_long_as_that_fits(checkpoints) -> None:
    engine = make(checkpoints, VramMode.AUTO)
    assert engine.mode is VramMode.STANDARD, "nothing limits a CPU"


def test_what_does_not_fit_is_refused_with_numbers_and_what_would_fit(checkpoints) -> None:
    engine = make(checkpoints, VramMode.STREAMED)
    budget = need(engine, VramMode.STANDARD) - 1
    tight = make(checkpoints, VramMode.STREAMED, budget)
    with pytest.raises(OutOfMemory, match=r"standard needs .* GiB on cpu for .*; streamed fits"):
        list(tight.denoise(replace(SPEC, vram_mode=VramMode.STANDARD), inputs()))
    with pytest.raises(OutOfMemory, match="streamed fits"):
        tight.set_mode(VramMode.STANDARD, MODEL)
    assert tight.mode is VramMode.STREAMED
    run(tight)
    with pytest.raises(OutOfMemory, match="no mode fits"):
        make(checkpoints, VramMode.STANDARD, 1000)


def test_as_many_blocks_stay_as_the_estimate_has_room_for(tmp_path) -> None:
    deep = replace(SMALL, num_layers=8)
    write_variant(tmp_path, MODEL, config=deep)
    engine = make(tmp_path, VramMode.STREAMED)
    served, standard = engine.served[MODEL], run(make(tmp_path, VramMode.STANDARD))
    budget = (need(engine, VramMode.STANDARD) + need(engine, VramMode.STREAMED)) // 2
    expected = plan_fusion(fusion_sizes(deep, 4), largest_clip(served), VramMode.STREAMED, budget)
    limited = make(tmp_path, VramMode.STREAMED, budget)
    plan = limited.plan(MODEL)
    assert plan.layout == expected.layout and plan.components == expected.components
    assert 0 < plan.layout.num_resident < deep.num_layers
    assert same(run(limited), standard)


def test_all_gpu_refuses_a_cpu(checkpoints) -> None:
    engine = make(checkpoints, VramMode.STANDARD)
    with pytest.raises(InvalidRequest, match="all_gpu"):
        engine.set_mode(VramMode.ALL_GPU, MODEL)
    with pytest.raises(InvalidRequest, match="all_gpu"):
        list(engine.denoise(replace(SPEC, vram_mode=VramMode.ALL_GPU), inputs()))


def with_failures(engine: FusionEngine, calls: set[int]) -> FusionEngine:
    """The engine, out of memory at these calls of the video tower's feed-forward (counted from 1)."""
    feed_forward, count = engine.ops.ops.video.feed_forward, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return feed_forward(*args)

    ops = engine.ops.ops
    engine.ops = replace(engine.ops, ops=ops._replace(video=replace(ops.video, feed_forward=failing)))
    return engine


FIRST_STEP_DONE = 6
"""Calls of a step: two passes of three blocks, one block left out, so 5; then this is in the second step."""


def test_a_run_whose_memory_runs_out_is_made_in_the_next_lower_mode(checkpoints) -> None:
    standard = run(make(checkpoints, VramMode.STANDARD))
    engine = with_failures(make(checkpoints, VramMode.AUTO), {FIRST_STEP_DONE})
    events = list(engine.denoise(SPEC, inputs()))
    kinds = [event.index if isinstance(event, StepDone) else type(event) for event in events]
    assert kinds == [1, ModeLowered, 1, 2, Latents]
    lowered = events[1]
    assert isinstance(lowered, ModeLowered) and lowered.mode is VramMode.STREAMED
    assert "1.00 GiB" in lowered.reason
    latents = events[-1]
    assert isinstance(latents, Latents) and same(latents, standard), "the lower mode is lossless"
    assert engine.mode is VramMode.STANDARD
    assert same(run(engine), standard), "the engine lives on"


def test_a_second_time_in_one_run_is_an_error_and_the_engine_lives(checkpoints) -> None:
    engine = with_failures(make(checkpoints, VramMode.AUTO), {FIRST_STEP_DONE, FIRST_STEP_DONE + 1})
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.denoise(SPEC, inputs()))
    run(engine)


def test_a_run_that_asked_for_no_loss_gets_none(checkpoints) -> None:
    engine = with_failures(make(checkpoints, VramMode.STANDARD), {1, 2})
    with pytest.raises(OutOfMemory, match=r"ran out in mode streamed .* no lower mode may be used"):
        list(engine.denoise(replace(SPEC, vram_mode=VramMode.STREAMED), inputs()))
    assert all(RECIPES[mode].lossless for mode in (VramMode.STANDARD, VramMode.STREAMED))
    # With AUTO the loss is taken, and said.
    engine = with_failures(make(checkpoints, VramMode.STREAMED), {1})
    lowered = next(event for event in engine.denoise(SPEC, inputs()) if isinstance(event, ModeLowered))
    assert lowered.mode is VramMode.FP8_OFFLOAD
