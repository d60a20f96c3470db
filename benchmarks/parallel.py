"""Time one guided step (both passes) of the fusion model spread over the GPUs of a host, random weights.

`torchrun --standalone --nproc-per-node N -m benchmarks.parallel [--plans 2x2,1x4] [--clips ...] [--json FILE]`

A plan is GUIDANCExSEQUENCE. Every plan's prediction is compared with the same step made by rank 0 alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.fusion import CLIPS, Clip, count_flop, random_model
from services.fusion.model.config import RELEASED
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import select_ops
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.guidance import bind_split_guidance
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.parallel.sequence import SequenceParallelModel
from services.fusion.sampling.denoise import Conditions, Latents, Predictor, bind_forward, bind_guidance, draw_noise
from shared.group.ranks import Ranks, join_group

SKIP_LAYER = 11


@dataclass(frozen=True)
class Row:
    """One clip under one plan."""

    clip: str
    plan: str
    ranks: int
    step_s: float
    alone_s: float
    tflop_per_s_per_gpu: float
    relative_error: float
    peak_gib: float


def median_step(predict: Predictor, latents: Latents, conditions: Conditions, repeats: int) -> float:
    """Median seconds of a step over `repeats`, after two warm-up steps, from a barrier to the end on this rank."""
    timestep = torch.tensor(500.0, device=latents.video_CFHW.device)
    times = []
    for index in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        predict(latents, timestep, conditions, skip_layer=SKIP_LAYER)
        torch.cuda.synchronize()
        if index >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def relative_error(ours: tuple[Latents, Latents | None], alone: tuple[Latents, Latents | None]) -> float:
    """The largest of the four predictions' ‖ours - alone‖ / ‖alone‖."""
    errors = []
    for mine, theirs in zip(ours, alone, strict=True):
        assert mine is not None and theirs is not None
        pairs = ((mine.video_CFHW, theirs.video_CFHW), (mine.audio_SC, theirs.audio_SC))
        errors += [float((a - b).norm() / b.norm()) for a, b in pairs]
    return max(errors)


def measure(name: str, clip: Clip, model: FusionModel, plans: list[ParallelPlan], repeats: int) -> list[Row]:
    """Every plan on one clip; on all ranks."""
    device = torch.device("cuda", torch.cuda.current_device())
    ops = select_ops(device, torch.bfloat16).ops
    rope = model.rope_tables((clip.frames, clip.height, clip.width), clip.audio_length).to(device)
    noise = draw_noise((48, clip.frames, clip.height, clip.width), (clip.audio_length, 20), 0)
    latents = Latents(noise.video_CFHW.to(device), noise.audio_SC.to(device))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(100, model.config.text_dim, generator=generator).to(device) for _ in range(3)]
    conditions = Conditions(model.encode_text(texts[0], texts[0]), model.encode_text(texts[1], texts[2]), None)
    timestep = torch.tensor(500.0, device=device)
    single = bind_guidance(bind_forward(model, rope, ops))
    alone_s = median_step(single, latents, conditions, 3)
    alone = single(latents, timestep, conditions, skip_layer=SKIP_LAYER)
    tflop = 2 * sum(count_flop(RELEASED, clip)) / 1e12
    rows = []
    for plan in plans:
        groups = make_groups(plan)
        network = SequenceParallelModel(model, groups.sequence) if plan.sequence_degree > 1 else model
        forward = bind_forward(network, rope, ops)
        predict = bind_split_guidance(forward, groups.guidance) if plan.guidance_degree > 1 else bind_guidance(forward)
        torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        step_s = median_step(predict, latents, conditions, repeats)
        error = relative_error(predict(latents, timestep, conditions, skip_layer=SKIP_LAYER), alone)
        peak = torch.cuda.max_memory_allocated() / 2**30
        rate = tflop / step_s / plan.world_size
        rows.append(Row(name, plan.describe(), plan.world_size, step_s, alone_s, rate, error, peak))
        if dist.get_rank() == 0:
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", help="default: the one the service chooses")
    parser.add_argument("--clips", default=",".join(CLIPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ranks = Ranks.from_environment(os.environ)
    chosen = ParallelPlan.auto(ranks.world_size, RELEASED.num_heads)
    device = torch.device("cuda", ranks.local_rank)
    join_group(ranks, device)
    texts = args.plans.split(",") if args.plans else []
    plans = [ParallelPlan(*map(int, text.split("x"))) for text in texts] or [chosen]
    model = random_model(RELEASED, device)
    rows = [row for name in args.clips.split(",") for row in measure(name, CLIPS[name], model, plans, args.repeats)]
    if ranks.rank == 0 and args.json:
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
