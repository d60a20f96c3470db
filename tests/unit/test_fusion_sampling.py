"""The sampling loop: which passes run, what is kept clean, that it stops, that a seed decides everything."""

from __future__ import annotations

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.model.operations import Ops
from services.fusion.sampling.denoise import (
    Conditions,
    Latents,
    StepDone,
    bind_forward,
    bind_guidance,
    denoise,
    draw_noise,
    guided,
)
from services.fusion.sampling.solvers import FlowSolver
from shared.sampling_options import SamplingOptions, Solver, check_sampling_options
from tests.fusion_checkpoint import SMALL, random_weights

VIDEO, AUDIO = (48, 3, 4, 6), (9, 20)


@pytest.fixture(scope="module")
def model():
    return build(SMALL, {key: value.float() for key, value in random_weights(SMALL).items()})


@pytest.fixture(scope="module")
def conditions(model):
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(length, SMALL.text_dim, generator=generator) for length in (7, 4))
    with torch.inference_mode():
        return Conditions(*model.encode_texts([(prompt, prompt), (negative, negative)]), None)


class Recorder:
    """A model that notes how it was called, as a predictor."""

    def __init__(self, model) -> None:
        self._model = model
        self.calls = []
        self.predict = bind_guidance(bind_forward(self._forward, model.rope_tables(VIDEO[1:], AUDIO[0]), Ops.of(sdpa)))

    def __call__(self, *arguments, **keywords):
        return self.predict(*arguments, **keywords)

    def _forward(self, video, audio, timestep, branches, rope, ops, **keywords):
        for branch in branches:
            options = {**keywords, "skip_layer": branch.skip_layer}
            self.calls.append((float(timestep), branch.text, options, Latents(video, audio)))
        return self._model(video, audio, timestep, branches, rope, ops, **keywords)


def predictor(model) -> Recorder:
    return Recorder(model)


def final(events) -> Latents:
    *steps, latents = events
    assert all(isinstance(step, StepDone) for step in steps)
    assert torch.isfinite(latents.video_CFHW).all() and torch.isfinite(latents.audio_SC).all()
    return latents


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_every_solver_ends_at_zero_noise(solver, steps) -> None:
    flow = FlowSolver(solver, steps, 5.0)
    assert len(flow.timesteps) == steps and len(flow.sigmas) == steps + 1 and flow.sigmas[-1] == 0
    assert all(a > b for a, b in zip(flow.sigmas, flow.sigmas[1:], strict=False))
    target = torch.randn(VIDEO, generator=torch.Generator().manual_seed(2))
    sample = torch.randn(VIDEO, generator=torch.Generator().manual_seed(3))
    for sigma in flow.sigmas[:-1]:
        sample = flow.step((sample - target) / sigma, sample)  # the velocity whose x0 is always `target`
    torch.testing.assert_close(sample, target, atol=1e-4, rtol=0)


def test_passes_and_their_arguments(model, conditions) -> None:
    predict = predictor(model)
    options = SamplingOptions(num_inference_steps=2, slg_layer=2)
    events = list(denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options))
    final(events)
    assert [(e.index, e.total) for e in events[:-1]] == [(1, 2), (2, 2)]
    assert [text is conditions.prompt for _, text, _, _ in predict.calls] == [True, False, True, False]
    assert [keywords["skip_layer"] for _, _, keywords, _ in predict.calls] == [0, 2, 0, 2]


def test_no_negative_pass_without_guidance(model, conditions) -> None:
    options = SamplingOptions(num_inference_steps=3, video_guidance_scale=1, audio_guidance_scale=1, slg_layer=0)
    assert not options.needs_negative_pass
    alone = Conditions(conditions.prompt, None, None)
    predict = predictor(model)
    single = final(denoise(predict, draw_noise(VIDEO, AUDIO, 5), alone, options))
    assert len(predict.calls) == 3
    both = final(denoise(predictor(model), draw_noise(VIDEO, AUDIO, 5), conditions, options))
    # neg + 1 * (pos - neg) is pos up to rounding
    torch.testing.assert_close(single.video_CFHW, both.video_CFHW, atol=1e-4, rtol=0)
    torch.testing.assert_close(single.audio_SC, both.audio_SC, atol=1e-4, rtol=0)


def test_guidance_formula() -> None:
    positive, negative = (draw_noise(VIDEO, AUDIO, seed) for seed in (1, 2))
    ours = guided(positive, negative, SamplingOptions(video_guidance_scale=4.0, audio_guidance_scale=3.0))
    for scale, out, pos, neg in [
        (4.0, ours.video_CFHW, positive.video_CFHW, negative.video_CFHW),
        (3.0, ours.audio_SC, positive.audio_SC, negative.audio_SC),
    ]:
        torch.testing.assert_close(out.double(), neg.double() + scale * (pos.double() - neg.double()))


def test_first_frame_stays_clean_at_every_step(model, conditions) -> None:
    picture = torch.randn(48, 4, 6, generator=torch.Generator().manual_seed(9))
    predict = predictor(model)
    given = Conditions(conditions.prompt, conditions.negative, picture)
    latents = final(denoise(predict, draw_noise(VIDEO, AUDIO, 5), given, SamplingOptions(3, slg_layer=1)))
    assert torch.equal(latents.video_CFHW[:, 0], picture)
    for _, _, keywords, seen in predict.calls:
        assert keywords["clean_first_frame"] and torch.equal(seen.video_CFHW[:, 0], picture)


def test_same_seed_same_latents_and_another_differs(model, conditions) -> None:
    options = SamplingOptions(num_inference_steps=2, slg_layer=1)
    runs = [final(denoise(predictor(model), draw_noise(VIDEO, AUDIO, s), conditions, options)) for s in (5, 5, 6)]
    assert torch.equal(runs[0].video_CFHW, runs[1].video_CFHW) and torch.equal(runs[0].audio_SC, runs[1].audio_SC)
    assert not torch.equal(runs[0].video_CFHW, runs[2].video_CFHW)


def test_stopping_between_steps_makes_no_further_prediction(model, conditions) -> None:
    predict = predictor(model)
    run = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, SamplingOptions(50, slg_layer=1))
    next(run)
    run.close()
    assert len(predict.calls) == 2


def test_time_rows_of_a_clean_frame_equal_a_token_by_token_reference(model) -> None:
    """With a clean first frame, each token sees the modulation of its own timestep: frame 0 that of 0, the rest t."""
    generator = torch.Generator().manual_seed(4)
    video = torch.randn(VIDEO, generator=generator)
    tower = model.video_model
    block = tower.blocks[0]
    tokens = tower.embed(video)
    per_frame = tokens.shape[0] // VIDEO[1]
    times = torch.tensor([0.0] * per_frame + [700.0] * (len(tokens) - per_frame))
    _, time_T6D = tower.time_rows(times)
    from services.fusion.model.layers import Affine
    from services.fusion.model.operations import add_gated, affine_norm

    shift, scale, gate, *_ = block.modulation(time_T6D).unbind(1)
    centred = tokens - tokens.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    _, rows = tower.time_rows(torch.tensor([0.0, 700.0]))
    row_shift, row_scale, row_gate, *_ = block.modulation(rows).unbind(1)
    ours = affine_norm(tokens, Affine(1 + row_scale, row_shift), per_frame)
    torch.testing.assert_close(ours, normal * (1 + scale) + shift, atol=1e-5, rtol=1e-5)
    gated = add_gated(tokens, normal, row_gate, per_frame)
    torch.testing.assert_close(gated, tokens + gate * normal, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10001}, "num_inference_steps"),
        ({"video_guidance_scale": float("nan")}, "video_guidance_scale"),
        ({"audio_guidance_scale": float("inf")}, "audio_guidance_scale"),
        ({"audio_guidance_scale": 0.5}, "audio_guidance_scale"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"flow_shift": float("nan")}, "flow_shift"),
        ({"slg_layer": 30}, "slg_layer"),
        ({"slg_layer": -1}, "slg_layer"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"step_cache_threshold": -0.5}, "step_cache_threshold"),
        ({"step_cache_threshold": 1.5}, "step_cache_threshold"),
        ({"step_cache_threshold": float("nan")}, "step_cache_threshold"),
    ],
)
def test_limits_name_field_and_value(change, field) -> None:
    (violation,) = check_sampling_options(SamplingOptions(**change), num_layers=30, prefix="options.")
    assert violation.field == f"options.{field}"
    assert str(change[field]) in violation.description and "allowed" in violation.description


def test_defaults_are_legal_for_the_release() -> None:
    assert check_sampling_options(SamplingOptions(), num_layers=30, prefix="") == []
