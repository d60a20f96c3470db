"""How far a prediction and the final latents move when a run is computed in another way, and what that way gains.

`python -m benchmarks.drift [--clips 720x720_5s] [--steps 10] [--variants "attention;cache 0.2;fp8"] [--save]`
`torchrun --standalone --nproc-per-node N -m benchmarks.drift --variants plan` compares N ranks with one.
`... --device cpu --preset tiny` runs the same anywhere.

Every variant is compared with the service's default way on one GPU, from the same noise and texts. `attention` is the
scale of the others: another attention kernel changes nothing but the order of sums, and is as right as the default.

The weights are random, with gates, time projection and text scaled so that a step resembles the one before, see
`soften`. Drift of arithmetic (attention, kernels, plans, fp8) depends on the sizes of weights and activations; a
trained model's has the same causes, but outliers that random weights lack make its fp8 drift larger. Drift of the step
cache depends on how alike a trained model's steps are, which no random weights tell: its rows show what a reused step
saves and that the error grows with the threshold. Neither says how a clip looks.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import CLIPS, describe_run, preset, random_model, result_path, save_result
from benchmarks.fusion import SKIP_LAYER, Subject
from services.fusion.attention import sdpa
from services.fusion.model.block import TowerBlock
from services.fusion.model.fusion import FusionModel
from services.fusion.model.operations import Ops, TowerOps
from services.fusion.ops import Kernels, SelectedOps, select_ops
from services.fusion.packing import pack_projections
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.groups import Groups, make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.quantization import quantize
from services.fusion.sampling.denoise import Latents, Predictor, StepDone, denoise
from services.fusion.sampling.step_cache import Agree, StepCache
from shared.group.ranks import Ranks, join_group, rank_device
from shared.memory.modes import WeightFormat
from shared.sampling_options import SamplingOptions

DEFAULT = "default"


@dataclass(frozen=True)
class Drift:
    """Of some tensors from others, the largest of each kind over all pairs."""

    error: float
    """‖ours - theirs‖ / ‖theirs‖."""
    cosine: float
    """Of the angle between them; the smallest."""

    @classmethod
    def between(cls, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Drift:
        """Of (ours, theirs), at least one."""
        doubles = [(ours.double().flatten(), theirs.double().flatten()) for ours, theirs in pairs]
        errors = [float((a - b).norm() / b.norm()) for a, b in doubles]
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in doubles]
        return cls(max(errors), min(cosines))


@dataclass(frozen=True)
class Row:
    """One variant on one clip."""

    clip: str
    variant: str
    plan: str
    steps: int
    steps_reused: int
    step_s: float
    """Mean wall time of a guided step of the run."""
    gain: float
    """The default's step_s / step_s."""
    prediction_video_error: float
    """Of the prediction at half of the steps, the worse of the prompt's and the negative one; of a step cache it is
    that of a step that reuses the one before."""
    prediction_video_cosine: float
    prediction_audio_error: float
    prediction_audio_cosine: float
    final_video_error: float
    """Of the latents after all steps."""
    final_video_cosine: float
    final_audio_error: float
    final_audio_cosine: float


@dataclass(frozen=True)
class Bench:
    """What variants are made of."""

    subject: Subject
    selected: SelectedOps
    plan: ParallelPlan
    """Of all ranks."""
    groups: Groups | None
    """Of the plan; None where there is one rank."""

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.subject.timestep.device

    def predictor(self, ops: Ops | None = None, groups: Groups | None = None) -> Predictor:
        """The service's, with other operations or spread over ranks."""
        model, rope = self.subject.model, self.subject.rope
        return make_predictor(model, rope, ops or self.selected.ops, groups)

    def agreement(self, variant: Variant) -> Agree:
        """Of the ranks that share a variant's run."""
        return bind_agreement(self.groups if variant.spread else None)


def other_attention(bench: Bench) -> Predictor:
    """Flash attention where the default is cuDNN's; plain products on a CPU."""
    backend = SDPBackend.FLASH_ATTENTION if bench.device.type == "cuda" else SDPBackend.MATH

    def attend(q_TNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa(q_TNK, k_SNK, v_SNK)

    def with_it(tower: TowerOps) -> TowerOps:
        return replace(tower, self_attention=attend, text_attention=attend, other_attention=attend)

    ops = bench.selected.ops
    return bench.predictor(ops._replace(video=with_it(ops.video), audio=with_it(ops.audio)))


def reference_kernels(bench: Bench) -> Predictor:
    """No fused kernels."""
    dtype = bench.subject.model.video_model.head.head.weight.dtype
    return bench.predictor(select_ops(bench.device, dtype, Kernels.REFERENCE).ops)


def all_ranks(bench: Bench) -> Predictor:
    """The plan that the service chooses for this number of ranks."""
    return bench.predictor(groups=bench.groups)


def fp8_products(bench: Bench) -> Predictor:
    """Weights and products in fp8. Changes the model for good."""
    quantize(bench.subject.model, WeightFormat.FP8)
    if bench.selected.fused:
        pack_projections(bench.subject.model)
    return bench.predictor()


@dataclass(frozen=True)
class Variant:
    """Another way to compute a run."""

    make: Callable[[Bench], Predictor] = Bench.predictor
    step_cache_threshold: float = 0.0
    spread: bool = False
    """Needs several ranks."""


VARIANTS: dict[str, Variant] = {
    "attention": Variant(other_attention),
    "reference": Variant(reference_kernels),
    "cache 0.1": Variant(step_cache_threshold=0.1),
    "cache 0.2": Variant(step_cache_threshold=0.2),
    "cache 0.3": Variant(step_cache_threshold=0.3),
    "plan": Variant(all_ranks, spread=True),
    "plan, cache 0.2": Variant(all_ranks, step_cache_threshold=0.2, spread=True),
    "fp8": Variant(fp8_products),
}
"""Measured in this order: fp8 comes last, since it changes the model."""


Asked = tuple[Latents, torch.Tensor]
"""Latents and timestep of a step."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    final: Latents
    step_s: float
    steps_reused: int
    asked: list[Asked]
    """Of every step."""


@torch.no_grad()
def soften(model: FusionModel) -> None:
    """Scale weights so that steps resemble each other as a trained model's do.

    Random gates follow the timestep wildly and random texts move everything: the time projection and what is read from
    the text and the other tower are made small, and the gates come from the blocks' own tables.
    """
    generator = torch.Generator().manual_seed(2)
    for tower in (model.video_model, model.audio_model):
        cast("nn.Linear", tower.time_projection[1]).weight.mul_(0.02)
        for block in tower.blocks:
            assert isinstance(block, TowerBlock)
            block.cross_attn.o.weight.mul_(0.1)
            table = block.modulation.modulation
            for gate in (2, 5):
                table[:, gate] = 0.3 * torch.randn(table[:, gate].shape, generator=generator).to(table.device)


def sample(bench: Bench, predict: Predictor, variant: Variant, steps: int) -> Run:
    """All steps of a run."""
    asked: list[Asked] = []

    def noting(latents: Latents, timestep: torch.Tensor, *rest: Any, **more: Any) -> tuple[Latents, Latents | None]:
        asked.append((latents, timestep))
        return predict(latents, timestep, *rest, **more)

    threshold = variant.step_cache_threshold
    options = SamplingOptions(num_inference_steps=steps, slg_layer=SKIP_LAYER, step_cache_threshold=threshold)
    subject = bench.subject
    *events, final = denoise(noting, subject.latents, subject.conditions, options, bench.agreement(variant))
    done = [event for event in events if isinstance(event, StepDone)]
    assert isinstance(final, Latents)
    seconds = statistics.mean(step.seconds for step in done)
    return Run(final, seconds, sum(step.reused for step in done), asked)


def predict_at(
    bench: Bench, predict: Predictor, variant: Variant, before: Asked, moment: Asked
) -> tuple[Latents, Latents]:
    """Both predictions of a step; by a step cache, with what the step before it computed."""
    more: dict[str, Any] = {"skip_layer": SKIP_LAYER}
    if variant.step_cache_threshold:
        cache = StepCache(math.inf, bench.agreement(variant))
        more["run_blocks"] = cache.run
        cache.begin_step(must_compute=True)
        predict(*before, bench.subject.conditions, **more)
        cache.begin_step(must_compute=False)
    positive, negative = predict(*moment, bench.subject.conditions, **more)
    assert negative is not None
    return positive, negative


def make_row(clip: str, name: str, plan: str, run: Run, base: Run, predictions: list[tuple[Latents, Latents]]) -> Row:
    """One line of the table; `predictions` are pairs of the variant's and the default's."""
    video = Drift.between([(ours.video_CFHW, theirs.video_CFHW) for ours, theirs in predictions])
    audio = Drift.between([(ours.audio_SC, theirs.audio_SC) for ours, theirs in predictions])
    final_video = Drift.between([(run.final.video_CFHW, base.final.video_CFHW)])
    final_audio = Drift.between([(run.final.audio_SC, base.final.audio_SC)])
    return Row(
        clip=clip,
        variant=name,
        plan=plan,
        steps=len(run.asked),
        steps_reused=run.steps_reused,
        step_s=run.step_s,
        gain=base.step_s / run.step_s,
        prediction_video_error=video.error,
        prediction_video_cosine=video.cosine,
        prediction_audio_error=audio.error,
        prediction_audio_cosine=audio.cosine,
        final_video_error=final_video.error,
        final_video_cosine=final_video.cosine,
        final_audio_error=final_audio.error,
        final_audio_cosine=final_audio.cosine,
    )


def measure(clip: str, bench: Bench, variants: dict[str, Variant], steps: int) -> Iterator[Row]:
    """The default, then every variant on one clip; on all ranks."""
    base: Run | None = None
    expected: tuple[Latents, Latents] | None = None
    for name, variant in {DEFAULT: Variant(), **variants}.items():
        if dist.is_initialized():
            dist.barrier()
        predict = variant.make(bench)
        # The first call chooses kernels, the second records graphs, which a step cache does not use.
        for _ in range(1 if variant.step_cache_threshold else 2):
            bench.subject.step(predict)
        run = sample(bench, predict, variant, steps)
        base = base or run
        predictions = predict_at(bench, predict, variant, *base.asked[steps // 2 - 1 : steps // 2 + 1])
        expected = expected or predictions
        plan = bench.plan.describe() if variant.spread else "single"
        yield make_row(clip, name, plan, run, base, list(zip(predictions, expected, strict=True)))


def parse_variants(text: str, world_size: int) -> dict[str, Variant]:
    """The named variants in the table's order; all that this number of ranks can run if the text is empty.

    Raises:
        ValueError: an unknown one, or one that needs several ranks where there is one.
    """
    possible = {name: variant for name, variant in VARIANTS.items() if world_size > 1 or not variant.spread}
    wanted = {name.strip() for name in text.split(";")} if text else set(possible)
    if unknown := wanted - set(possible):
        raise ValueError(f"--variants: got {sorted(unknown)}, allowed on {world_size} ranks are {list(possible)}")
    return {name: variant for name, variant in possible.items() if name in wanted}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clips", default="720x720_5s", help=f"some of {','.join(CLIPS)}")
    add("--variants", default="", help=f"some of '{';'.join(VARIANTS)}', divided by semicolons; default all")
    add("--steps", type=int, default=10, help="solver steps, at least 3")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--preset", choices=["full", "tiny"], default="full")
    add("--save", action="store_true", help="keep the result in benchmarks/results")
    add("--json", type=Path, help="keep the result in this file")
    return parser


@torch.inference_mode()
def main() -> None:
    """Measure; print on rank 0."""
    args = _parser().parse_args()
    ranks = Ranks.from_environment(os.environ)
    variants = parse_variants(args.variants, ranks.world_size)
    device = rank_device(torch.device(args.device), ranks)
    fellowship = join_group(ranks, device) if ranks.world_size > 1 else None
    chosen = preset(args.preset)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    selected = select_ops(device, dtype)
    plan = ParallelPlan.auto(ranks.world_size, chosen.config.num_heads)
    groups = make_groups(plan) if fellowship is not None else None
    described = describe_run("drift", device, ranks.world_size, args) | {
        "preset": args.preset,
        "kernels": selected.name,
    }
    rows = []
    for clip in args.clips.split(","):
        model = random_model(chosen.config, device, dtype)
        soften(model)
        if selected.fused:
            pack_projections(model)
        bench = Bench(Subject.make(model, chosen.clips[clip], device), selected, plan, groups)
        for row in measure(clip, bench, variants, args.steps):
            rows.append(row)
            if ranks.rank == 0:
                sys.stdout.write(f"{row}\n")
                sys.stdout.flush()
        del model, bench
    if ranks.rank == 0 and (args.save or args.json):
        save_result(args.json or result_path(described), described, rows)
    if fellowship is not None:
        fellowship.leave()


if __name__ == "__main__":
    main()
