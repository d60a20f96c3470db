"""The step cache: when it reuses, what a reused step is made of, that nothing outlives a run, that off means off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.model.fusion import Pass, Tokens
from services.fusion.model.operations import Ops
from services.fusion.sampling.denoise import (
    Conditions,
    Latents,
    bind_forward,
    bind_guidance,
    denoise,
    draw_noise,
)
from services.fusion.sampling.step_cache import StepCache
from shared.sampling_options import SamplingOptions
from tests.fusion_checkpoint import SMALL, random_weights

VIDEO, AUDIO = (48, 3, 4, 6), (9, 20)
ALWAYS = 1e9
"""A threshold that every finite change is below."""


@pytest.fixture(scope="module")
def model():
    return build(SMALL, {key: value.float() for key, value in random_weights(SMALL).items()})


@pytest.fixture(scope="module")
def predict(model):
    return bind_guidance(bind_forward(model, model.rope_tables(VIDEO[1:], AUDIO[0]), Ops.of(sdpa)))


@pytest.fixture(params=["t2v", "i2v"])
def conditions(model, request):
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(length, SMALL.text_dim, generator=generator) for length in (7, 4))
    picture = torch.randn(VIDEO[0], *VIDEO[2:], generator=generator) if request.param == "i2v" else None
    with torch.inference_mode():
        return Conditions(*model.encode_texts([(prompt, prompt), (negative, negative)]), picture)


def run(predict, conditions, options, **more) -> tuple[Latents, list[bool]]:
    *steps, latents = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options, **more)
    assert torch.isfinite(latents.video_CFHW).all() and torch.isfinite(latents.audio_SC).all()
    return latents, [step.reused for step in steps]


def same(a: Latents, b: Latents) -> bool:
    return torch.equal(a.video_CFHW, b.video_CFHW) and torch.equal(a.audio_SC, b.audio_SC)


def test_off_asks_nobody_and_equals_a_cache_that_never_reuses(predict, conditions) -> None:
    def refuse(sums_22: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no rank is asked where the cache is off")

    options = SamplingOptions(4, slg_layer=1)
    off, reused = run(predict, conditions, options, agree=refuse)
    assert reused == [False] * 4
    never, reused = run(predict, conditions, replace(options, step_cache_threshold=1e-30))
    assert reused == [False] * 4
    assert same(off, never), "cutting the blocks after the first changes no bit"


def test_first_and_last_step_are_always_computed(predict, conditions) -> None:
    for steps in (1, 2, 3, 6):
        _, reused = run(predict, conditions, SamplingOptions(steps, slg_layer=1, step_cache_threshold=ALWAYS))
        assert reused == [0 < index < steps - 1 for index in range(steps)]


def test_nothing_outlives_a_run(predict, conditions) -> None:
    options = SamplingOptions(5, slg_layer=1, step_cache_threshold=ALWAYS)
    first, _ = run(predict, conditions, options)
    run(predict, conditions, replace(options, num_inference_steps=3, slg_layer=2))
    again, _ = run(predict, conditions, options)
    assert same(first, again)


@torch.inference_mode()
def test_a_reused_step_is_block_0_and_what_the_others_of_its_branch_added(predict, conditions) -> None:
    cache = StepCache(ALWAYS)
    early, late = draw_noise(VIDEO, AUDIO, 5), draw_noise(VIDEO, AUDIO, 6)
    cache.begin_step(must_compute=True)
    computed = predict(early, torch.tensor(900.0), conditions, skip_layer=2, run_blocks=cache.run)
    cache.begin_step(must_compute=False)
    reused = predict(late, torch.tensor(700.0), conditions, skip_layer=2, run_blocks=cache.run)
    assert cache.reused

    kept: list[Tokens] = []

    def tracing(passes):
        """Pass after pass, block after block."""
        results = []
        for tokens, blocks in passes:
            first = tokens = next(blocks)(tokens)
            for block in blocks:
                tokens = tokens if block is None else block(tokens)
            kept.append(Tokens(*(b - a for a, b in zip(first, tokens, strict=True))))
            results.append(tokens)
        return results

    def adding(passes):
        return [
            Tokens(*(a + b for a, b in zip(next(blocks)(tokens), kept.pop(0), strict=True)))
            for tokens, blocks in passes
        ]

    expected = [
        predict(early, torch.tensor(900.0), conditions, skip_layer=2, run_blocks=tracing),
        predict(late, torch.tensor(700.0), conditions, skip_layer=2, run_blocks=adding),
    ]
    for ours, theirs in zip((*computed, *reused), (*expected[0], *expected[1]), strict=True):
        assert same(ours, theirs), "the same sums in the same order"
    assert not same(*reused), "each branch has its own"


def added(tokens: Tokens) -> Tokens:
    return Tokens(*(x + 1 for x in tokens))


def decisions(threshold: float, video: list[float], audio: list[float]) -> list[bool]:
    """What a cache decides where block 0 adds these constants step by step; a second block adds 1."""
    cache = StepCache(threshold)
    tokens = Tokens(torch.zeros(6, 4), torch.zeros(3, 4))
    made = []
    for step, (v, a) in enumerate(zip(video, audio, strict=True)):
        cache.begin_step(must_compute=step == 0)
        blocks = [lambda t, v=v, a=a: Tokens(t.video_TD + v, t.audio_SD + a), None, added]
        (out,) = cache.run([Pass(tokens, iter(blocks))])
        torch.testing.assert_close(out[0], tokens[0] + v + 1, equal_nan=True)
        torch.testing.assert_close(out[1], tokens[1] + a + 1, equal_nan=True)
        made.append(cache.reused)
    return made


@pytest.mark.parametrize(
    ("video", "audio", "reused"),
    [
        ([1, 1.06, 1.09, 1.2, 1.3], [1] * 5, [False, True, True, False, True]),
        ([1] * 5, [1, 1.06, 1.09, 1.2, 1.3], [False, True, True, False, True]),
        ([1, 1.09, 1.18], [1] * 3, [False, True, False]),  # small steps, but far from the computed one
        ([1, 1.2, 1], [1] * 3, [False, False, False]),
        ([-1, 1, 1], [1] * 3, [False, False, True]),
        ([1, math.nan, 1], [1] * 3, [False, False, False]),
        ([0, 0, 0], [1] * 3, [False, False, False]),  # no size to compare with
    ],
)
def test_the_change_is_from_the_last_computed_step_in_the_tower_that_changed_more(video, audio, reused) -> None:
    assert decisions(0.1, video, audio) == reused


def test_sums_come_from_the_group() -> None:
    """What Agree answers decides, not this rank's own sums."""
    cache = StepCache(0.1, agree=lambda sums_22: torch.tensor([[0.0, 1.0], [0.2, 1.0]]))
    for must_compute in (True, False):
        cache.begin_step(must_compute=must_compute)
        cache.run([Pass(Tokens(torch.zeros(2, 4), torch.zeros(2, 4)), iter([added]))])
    assert not cache.reused, "a fifth is no tenth"
