"""Every split of a run over ranks gives what one process gives: both axes, odd lengths, picture, skipped layer."""

from __future__ import annotations

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.memory.chunks import chunked
from services.fusion.model.config import FusionConfig
from services.fusion.model.operations import Ops
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan, shard_sizes
from services.fusion.parallel.sequence import attention_with_lse
from services.fusion.sampling.denoise import Conditions, Latents, bind_forward, bind_guidance, denoise, draw_noise
from shared.sampling_options import SamplingOptions
from tests.distributed.ranks import run_ranks
from tests.fusion_checkpoint import random_weights

CONFIG = FusionConfig(dim=144, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=24, num_layers=3, text_len=16)
CASES = {
    "t2v": ((48, 3, 6, 10), 17, False, SamplingOptions(2, slg_layer=0)),
    "skip_layer": ((48, 2, 4, 6), 13, False, SamplingOptions(2, slg_layer=2)),
    "i2v": ((48, 5, 2, 6), 9, True, SamplingOptions(2, slg_layer=1)),
    "no_guidance": ((48, 3, 2, 10), 5, False, SamplingOptions(2, 1.0, 1.0, slg_layer=0)),
}
TOLERANCE = 1e-5
"""Of the largest value, float32: the splits change the order of sums only, and guidance amplifies what that changes."""


def conditions_of(model, picture: bool, options: SamplingOptions, video_shape) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    prompt, negative, other = (torch.randn(n, CONFIG.text_dim, generator=generator) for n in (7, 4, 3))
    first = torch.randn(48, *video_shape[2:], generator=generator) if picture else None
    texts = [(prompt, prompt), (negative, other)] if options.needs_negative_pass else [(prompt, prompt)]
    made = model.encode_texts(texts)
    return Conditions(made[0], made[1] if len(made) > 1 else None, first)


def run_case(name: str, plan: ParallelPlan | None, chunk_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """One sampling run; on this rank's share if there is a plan, over so many tokens at once if a number is given."""
    video_shape, audio_length, picture, options = CASES[name]
    model = build(CONFIG, {key: value.float() for key, value in random_weights(CONFIG).items()})
    rope = model.rope_tables(video_shape[1:], audio_length)
    conditions = conditions_of(model, picture, options, video_shape)
    if plan is None:
        predict = bind_guidance(bind_forward(model, rope, Ops.of(sdpa)))
    else:
        ops = chunked(Ops.of(sdpa), chunk_tokens) if chunk_tokens else Ops.of(sdpa)
        predict = make_predictor(model, rope, ops, make_groups(plan), graphs=False)
    noise = draw_noise(video_shape, (audio_length, 20), 5)
    *_, final = denoise(predict, noise, conditions, options)
    assert isinstance(final, Latents)
    return {"video": final.video_CFHW, "audio": final.audio_SC}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the number of threads changes the order of sums, too
    results = {name: run_case(name, None) for name in CASES}
    torch.set_num_threads(threads)
    return results


@pytest.mark.parametrize("plan", [(2, 1), (1, 2), (1, 3), (2, 2), (1, 4), (1, 6), (2, 3), (2, 4), (1, 8)])
def test_ranks_agree_with_one_process(plan, alone) -> None:
    plan = ParallelPlan(*plan)
    for name in CASES:
        results = run_ranks(plan.world_size, run_case, name, plan)
        for key, expected in alone[name].items():
            error = (results[0][key] - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{name} {key} {error:.2e}"
            for other in results[1:]:
                assert torch.equal(other[key], results[0][key]), "ranks must never drift apart"


@pytest.mark.parametrize("plan", [(1, 2), (2, 3)])
def test_ranks_that_go_by_chunks_agree_with_one_process(plan, alone) -> None:
    plan = ParallelPlan(*plan)
    results = run_ranks(plan.world_size, run_case, "i2v", plan, 4)
    for key, expected in alone["i2v"].items():
        error = (results[0][key] - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, f"{key} {error:.2e}"


@pytest.mark.parametrize(("world", "expected"), [(1, (1, 1)), (2, (2, 1)), (3, (1, 3)), (4, (2, 2)), (8, (2, 4))])
def test_auto_plans(world, expected) -> None:
    plan = ParallelPlan.auto(world, 24)
    assert (plan.guidance_degree, plan.sequence_degree) == expected
    ranks = [plan.sequence_ranks(rank) for rank in range(world)]
    assert all(rank in members for rank, members in enumerate(ranks))
    assert all(plan.guidance_index(m) == plan.guidance_index(rank) for rank, ms in enumerate(ranks) for m in ms)


@pytest.mark.parametrize("world", [5, 7, 10])
def test_degrees_that_do_not_divide_the_heads_are_refused(world) -> None:
    with pytest.raises(ValueError, match=r"24 heads can be shared 1, 2, 3, 4, 6, 8, 12, 24 ways"):
        ParallelPlan.auto(world, 24)


def test_shards_cover_every_token_once() -> None:
    for length in (1, 7, 24, 15686):
        for degree in (1, 2, 3, 8):
            sizes = shard_sizes(length, degree)
            assert sum(sizes) == length and max(sizes) - min(sizes) <= 1


def test_attention_with_lse_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 4, 16, generator=generator) for length in (5, 33, 33))
    out, lse = attention_with_lse(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k, v), atol=1e-6, rtol=1e-5)
    scores = torch.einsum("snk,tnk->nst", q.double(), k.double()) / 4
    torch.testing.assert_close(lse.T.double(), torch.logsumexp(scores, -1), atol=1e-5, rtol=0)
