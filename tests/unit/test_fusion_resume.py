"""A run that goes on from a state: the same latents to the bit, for every solver and kind of run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.engine import FusionEngine
from services.fusion.model.operations import Ops
from services.fusion.quantization import quantize
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import (
    Conditions,
    Latents,
    RunState,
    StepDone,
    bind_forward,
    bind_guidance,
    denoise,
    draw_noise,
)
from services.fusion.sampling.run_file import RunShape, pack, unpack
from services.fusion.sampling.solvers import FlowSolver, history_names
from shared.memory.modes import VramMode, WeightFormat
from shared.sampling_options import SamplingOptions, Solver
from tests.fusion_checkpoint import SMALL, random_weights, write_variant

VIDEO, AUDIO = (48, 3, 4, 6), (9, 20)
STEPS = 6
IDENTITY = {"run": "this one"}
KINDS = {
    "guided": SamplingOptions(STEPS, slg_layer=0),
    "skipping a layer": SamplingOptions(STEPS, slg_layer=2),
    "unguided": SamplingOptions(STEPS, 1.0, 1.0, slg_layer=0),
    "step cache": SamplingOptions(STEPS, slg_layer=1, step_cache_threshold=0.9),
}


@pytest.fixture(scope="module", params=[WeightFormat.NATIVE, WeightFormat.INT8], ids=lambda each: each.value)
def model(request):
    model = build(SMALL, {key: value.float() for key, value in random_weights(SMALL).items()})
    quantize(model, request.param)
    return model


@pytest.fixture(scope="module")
def predict(model):
    return bind_guidance(bind_forward(model, model.rope_tables(VIDEO[1:], AUDIO[0]), Ops.of(sdpa)))


def conditions_of(model, options: SamplingOptions, *, picture: bool) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(length, SMALL.text_dim, generator=generator) for length in (7, 4))
    first = torch.randn(VIDEO[0], *VIDEO[2:], generator=generator) if picture else None
    texts = [(prompt, prompt), (negative, negative)] if options.needs_negative_pass else [(prompt, prompt)]
    with torch.inference_mode():
        made = model.encode_texts(texts)
    return Conditions(made[0], made[1] if len(made) > 1 else None, first)


def same(a: Latents, b: Latents) -> bool:
    assert torch.isfinite(a.video_CFHW).all() and torch.isfinite(a.audio_SC).all()
    return torch.equal(a.video_CFHW, b.video_CFHW) and torch.equal(a.audio_SC, b.audio_SC)


def through_a_file(state: RunState, options: SamplingOptions) -> RunState:
    """What another process reads of it."""
    return unpack(pack(state, IDENTITY, VramMode.STANDARD), IDENTITY, RunShape(VIDEO, AUDIO, options))


def with_some_reused(predict, conditions: Conditions, options: SamplingOptions) -> SamplingOptions:
    """With a threshold at which some of the steps between the first and the last are reused and some are not."""
    for threshold in (0.9, 1.1, 1.3, 1.6, 2.0, 3.0):
        options = replace(options, step_cache_threshold=threshold)
        *steps, _ = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options)
        if 0 < sum(step.reused for step in steps) < STEPS - 2:
            return options
    raise AssertionError("no threshold parts the steps")


@pytest.mark.parametrize("picture", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", Solver)
def test_from_every_state_the_rest_of_the_run_is_the_same_to_the_bit(model, predict, solver, kind, picture) -> None:
    options = replace(KINDS[kind], solver=solver)
    conditions = conditions_of(model, options, picture=picture)
    if options.step_cache_threshold:
        options = with_some_reused(predict, conditions, options)
    *steps, final = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options)
    states = [step.state for step in steps if step.state is not None and step.state.steps_done]
    reused = [step.reused for step in steps]
    if kind == "step cache":
        assert [state.steps_done for state in states] == [i for i in range(1, STEPS - 1) if not reused[i]]
    else:
        assert [state.steps_done for state in states] == list(range(1, STEPS))
    for state in states:
        kept = through_a_file(state, options)
        # Another noise: what a run goes on from is its state alone.
        *rest, again = denoise(predict, draw_noise(VIDEO, AUDIO, 6), conditions, options, start=kept)
        assert same(again, final), f"from step {state.steps_done}"
        assert [step.index for step in rest] == list(range(state.steps_done + 1, STEPS + 1))
        assert [step.reused for step in rest] == reused[state.steps_done :]
        assert kept.steps_reused == sum(reused[: state.steps_done])


def test_a_state_of_another_step_makes_another_clip(model, predict) -> None:
    options = KINDS["guided"]
    conditions = conditions_of(model, options, picture=False)
    *steps, final = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options)
    early, late = steps[1].state, steps[3].state
    for mixed in (
        replace(late, latents=early.latents),
        replace(late, video_history=early.video_history),
        replace(late, audio_history=early.audio_history),
        replace(early, steps_done=late.steps_done),
    ):
        *_, other = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options, start=mixed)
        assert not same(other, final), "every part of a state counts"


def test_without_a_state_every_solver_tensor_is_missed() -> None:
    """The names that a state must have are those that a solver tells; none of them is there for nothing."""
    for solver in Solver:
        flow = FlowSolver(solver, 9, 5.0)
        sample = torch.randn(VIDEO, generator=torch.Generator().manual_seed(2))
        for index in range(4):
            assert flow.history().keys() == history_names(solver, index)
            sample = flow.step(torch.sin(sample * (index + 1)), sample)
        expected = flow.step(sample.cos(), sample)
        for name in history_names(solver, 4):
            flow = FlowSolver(solver, 9, 5.0)
            other = sample
            for index in range(4):
                other = flow.step(torch.sin(other * (index + 1)), other)
            resumed = FlowSolver(solver, 9, 5.0)
            history = flow.history()
            resumed.restore(4, history | {name: history[name] + 1})
            assert not torch.equal(resumed.step(sample.cos(), sample), expected)


SPEC = RunSpec("720x720_5s", 64, 64, SamplingOptions(4, slg_layer=1, seed=7))


def inputs(seed: int = 3, *, picture: bool = False) -> RunInputs:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(6, SMALL.text_dim, generator=generator) for _ in range(3)]
    return RunInputs(*rows, torch.randn(48, 1, 4, 4, generator=generator) if picture else None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> FusionEngine:
    folder = tmp_path_factory.mktemp("resume")
    write_variant(folder, "720x720_5s", seed=1)
    write_variant(folder, "960x960_5s", seed=2)
    engine = FusionEngine(folder, torch.device("cpu"), torch.float32)
    engine.discover()
    return engine


@pytest.mark.parametrize(
    "mode", [VramMode.STANDARD, VramMode.STREAMED, VramMode.FP8, VramMode.ULTRA_LOW], ids=lambda each: each.value
)
@pytest.mark.parametrize("picture", [False, True], ids=["t2v", "i2v"])
def test_the_engine_goes_on_in_every_kind_of_mode(engine, mode, picture) -> None:
    given = inputs(picture=picture)
    *steps, final = engine.denoise(SPEC, given, mode)
    *rest, again = engine.denoise(SPEC, given, mode, steps[1].state)
    assert isinstance(final, Latents) and isinstance(again, Latents) and same(again, final)
    assert [step.index for step in rest if isinstance(step, StepDone)] == [3, 4]


def test_an_identity_knows_everything_that_decides_a_clip(engine) -> None:
    one = engine.identity(SPEC, inputs(), VramMode.STANDARD)
    assert engine.identity(SPEC, inputs(), VramMode.STANDARD) == one
    options = SPEC.options
    others = {
        "model": engine.identity(replace(SPEC, model="960x960_5s"), inputs(), VramMode.STANDARD),
        "size": engine.identity(replace(SPEC, height=32, width=128), inputs(), VramMode.STANDARD),
        "weights": engine.identity(SPEC, inputs(), VramMode.FP8),
        "inputs": engine.identity(SPEC, inputs(seed=4), VramMode.STANDARD),
    }
    changes = {"num_inference_steps": 5, "video_guidance_scale": 2.0, "audio_guidance_scale": 2.0, "flow_shift": 4.0}
    changes |= {"solver": Solver.EULER, "slg_layer": 0, "seed": 8, "step_cache_threshold": 0.1}
    assert changes.keys() == vars(options).keys(), "every option decides"
    for name, value in changes.items():
        spec = replace(SPEC, options=replace(options, **{name: value}))
        others[name] = engine.identity(spec, inputs(), VramMode.STANDARD)
    for name, other in others.items():
        assert {key for key in one if one[key] != other[key]} == {name}
    assert engine.identity(SPEC, inputs(picture=True), VramMode.STANDARD)["inputs"] != one["inputs"]
