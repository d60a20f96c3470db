"""The step cache on several ranks: the decisions and the latents of one process, for every kind of run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.model.operations import Ops
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.sampling.denoise import Latents, denoise, draw_noise
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parallel import CASES, CONFIG, TOLERANCE, conditions_of
from tests.fusion_checkpoint import random_weights

STEPS = 8
THRESHOLD = 0.11
"""Between the changes of these runs, far enough from each that rounding cannot turn a decision."""


@torch.inference_mode()
def run_cases(plan: ParallelPlan | None) -> dict[str, torch.Tensor]:
    """Latents and decisions of every case; on this rank's share if there is a plan.

    Weak heads make latents move slowly, and a weak time projection the modulation, so that steps resemble each other.
    """
    weights = {key: value.float() for key, value in random_weights(CONFIG).items()}
    for tower in ("video_model", "audio_model"):
        weights[f"{tower}.head.head.weight"] *= 0.1
        weights[f"{tower}.time_projection.1.weight"] *= 0.02
    model = build(CONFIG, weights)
    groups = make_groups(plan) if plan is not None else None
    results = {}
    for name, (video_shape, audio_length, picture, short) in CASES.items():
        options = replace(short, num_inference_steps=STEPS, step_cache_threshold=THRESHOLD)
        rope = model.rope_tables(video_shape[1:], audio_length)
        predict = make_predictor(model, rope, Ops.of(sdpa), groups, graphs=False)
        conditions = conditions_of(model, picture, options, video_shape)
        noise = draw_noise(video_shape, (audio_length, 20), 5)
        *steps, final = denoise(predict, noise, conditions, options, bind_agreement(groups))
        assert isinstance(final, Latents)
        results |= {f"{name} video": final.video_CFHW, f"{name} audio": final.audio_SC}
        results[f"{name} reused"] = torch.tensor([step.reused for step in steps])
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the number of threads changes the order of sums, too
    results = run_cases(None)
    torch.set_num_threads(threads)
    for name in CASES:
        assert 0 < results[f"{name} reused"].sum() < STEPS - 2, "both decisions are made"
    return results


@pytest.mark.parametrize("plan", [(2, 1), (1, 2), (1, 3), (2, 2)])
def test_ranks_decide_as_one_process(plan, alone) -> None:
    plan = ParallelPlan(*plan)
    results = run_ranks(plan.world_size, run_cases, plan)
    for key, expected in alone.items():
        if key.endswith("reused"):
            assert torch.equal(results[0][key], expected), key
        else:
            error = (results[0][key] - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{key} {error:.2e}"
        for other in results[1:]:
            assert torch.equal(other[key], results[0][key]), "ranks must never drift apart"
