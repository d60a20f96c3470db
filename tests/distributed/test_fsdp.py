"""Shared weights: ranks that hold only their rows compute what one process with all of them does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from services.fusion.attention import sdpa
from services.fusion.checkpoint import CONFIG_KEY, FusionFile
from services.fusion.model.fusion import FusionModel
from services.fusion.model.operations import Ops
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.fsdp import load_sharded
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.sampling.denoise import Latents, bind_forward, bind_guidance, denoise, draw_noise
from shared.checkpoints import SafetensorsHeader
from shared.sampling_options import SamplingOptions
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parallel import CASES, CONFIG, TOLERANCE, conditions_of
from tests.fusion_checkpoint import random_weights

CPU = torch.device("cpu")
MORE_CASES = CASES | {
    "steps_reused": ((48, 2, 4, 6), 7, False, SamplingOptions(4, slg_layer=1, step_cache_threshold=1.0)),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fsdp") / "model.safetensors"
    extra = {"num_heads": CONFIG.num_heads, "text_len": CONFIG.text_len}
    save_file(random_weights(CONFIG), path, metadata={CONFIG_KEY: json.dumps(extra)})
    return path


def run_jobs(path: Path, plan: ParallelPlan | None) -> dict[str, torch.Tensor]:
    """Every case, one job after the other on one model, on this rank's share if there is a plan."""
    file = FusionFile.open(path)
    groups = make_groups(plan) if plan is not None else None
    model: FusionModel
    if groups is None or groups.weights is None:
        model = file.load(CPU, torch.float32)
    else:
        model = load_sharded(file, groups.weights, CPU, torch.float32)
    results = {}
    for name, (video_shape, audio_length, picture, options) in MORE_CASES.items():
        rope = model.rope_tables(video_shape[1:], audio_length)
        conditions = conditions_of(model, picture, options, video_shape)
        ops = Ops.of(sdpa)
        if groups is None:
            predict = bind_guidance(bind_forward(model, rope, ops))
        else:
            predict = make_predictor(model, rope, ops, groups, graphs=False)
        noise = draw_noise(video_shape, (audio_length, 20), 5)
        *steps, final = denoise(predict, noise, conditions, options, bind_agreement(groups))
        assert isinstance(final, Latents)
        results |= {f"{name} video": final.video_CFHW, f"{name} audio": final.audio_SC}
        results[f"{name} reused"] = torch.tensor([step.reused for step in steps])
    return results


@pytest.fixture(scope="module")
def alone(path) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the number of threads changes the order of sums, too
    with torch.inference_mode():
        results = run_jobs(path, None)
    torch.set_num_threads(threads)
    assert any(results["steps_reused reused"]), "the blocks of a step are passed over"
    return results


@pytest.mark.parametrize("plan", [(2, 1, 2), (1, 2, 2), (1, 3, 3), (2, 2, 4), (2, 2, 2), (1, 4, 2)], ids=str)
def test_shared_weights_agree_with_one_process(plan, path, alone) -> None:
    plan = ParallelPlan(*plan)
    ranks = run_ranks(plan.world_size, run_jobs, path, plan)
    for key, expected in alone.items():
        if key.endswith("reused"):
            assert all(torch.equal(rank[key], expected) for rank in ranks)
            continue
        error = (ranks[0][key] - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, f"{key} {error:.2e}"
        assert all(torch.equal(rank[key], ranks[0][key]) for rank in ranks), "ranks must never drift apart"


def load_and_count(path: Path, plan: ParallelPlan) -> dict[str, torch.Tensor]:
    """What a rank reads, holds when loaded, holds after a pass, and its rows of every parameter."""
    groups = make_groups(plan)
    assert groups.weights is not None
    read = []
    whole = SafetensorsHeader.rows

    def counted(header, wanted, device):
        for key, rows in whole(header, wanted, device):
            read.append(rows.nbytes)
            yield key, rows

    SafetensorsHeader.rows = counted  # type: ignore[method-assign]
    model = load_sharded(FusionFile.open(path), groups.weights, CPU, torch.bfloat16)

    def held() -> int:
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        return sum(parameter.to_local().untyped_storage().nbytes() for parameter in parameters)

    before = held()
    model.encode_texts([(torch.zeros(3, CONFIG.text_dim), torch.zeros(3, CONFIG.text_dim))])
    # The unit used last stays whole until the next one is; text keys and values end with the last block.
    for block in model.fused_blocks:
        shapes = [parameter.shape for parameter in block.parameters() if not isinstance(parameter, DTensor)]
        assert not shapes or block is model.fused_blocks[-1]
    rows = {key: value.to_local() for key, value in model.state_dict().items() if isinstance(value, DTensor)}
    return rows | {"read": torch.tensor(sum(read)), "held": torch.tensor(before)}


@pytest.mark.parametrize("plan", [(1, 4, 4), (2, 2, 2), (1, 3, 3)], ids=str)
def test_a_rank_reads_and_holds_its_share_only(plan, path) -> None:
    plan = ParallelPlan(*plan)
    stored = load_file(path)
    total = sum(tensor.nbytes for tensor in stored.values())
    # Norms, biases and modulations of few rows are not split evenly, and FSDP pads them; they are a hundredth.
    share = total / plan.weights_degree
    ranks = run_ranks(plan.world_size, load_and_count, path, plan)
    for rank in ranks:
        assert rank["read"] <= 1.05 * share and rank["held"] <= 1.05 * share
    copies = plan.world_size // plan.weights_degree
    assert sum(rank["read"] for rank in ranks) == copies * total, "every value is read once a copy"
    for key in ("audio_model.patch_embedding.2.w1.weight", "video_model.blocks.1.ffn.0.weight"):
        first_copy = [rank[key] for rank in ranks[: plan.weights_degree]]
        assert torch.equal(torch.cat(first_copy), stored[key])
