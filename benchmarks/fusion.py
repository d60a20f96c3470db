"""Time guided steps (both passes) of the fusion model with random weights, on one device or on the GPUs of a host.

`python -m benchmarks.fusion [--clips 720x720_5s,...] [--kernels reference] [--repeats 5] [--profile] [--save]`
`torchrun --standalone --nproc-per-node N -m benchmarks.fusion [--plans auto,1xN] ...`
`... --device cpu --preset tiny` runs the same anywhere.

A plan is GUIDANCExSEQUENCE, `auto` the one the service chooses, 1x1 every rank by itself; with `fsdp:` before it, all
ranks share the weights. On several ranks every plan is compared with rank 0 alone, on the same machine in the same run.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.collectives import CollectiveTimes, costliest, profile_collectives
from benchmarks.common import (
    CLIPS,
    WARM_UP,
    Clip,
    Rates,
    Times,
    count_flop,
    describe_run,
    measure_rates,
    median_seconds,
    preset,
    random_model,
    result_path,
    save_result,
    synchronize,
)
from services.fusion.model.config import FusionConfig
from services.fusion.model.fusion import FusionModel, RopeTables
from services.fusion.ops import Execution, Kernels, SelectedOps, select_ops
from services.fusion.packing import pack_projections
from services.fusion.parallel.fsdp import own_rows, sharded_on_meta, whole_of
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.quantization import quantize
from services.fusion.sampling.denoise import Conditions, Latents, Predictor, draw_noise
from shared.checkpoints import assign_weights
from shared.group.ranks import Ranks, join_group, rank_device
from shared.memory.modes import WeightFormat

__all__ = ["CLIPS", "Clip", "count_flop", "measure_rates", "median_seconds", "random_model"]

SKIP_LAYER = 11
ALONE = ParallelPlan(1, 1)
_ALONE_REPEATS = 2
_PROMPT_ROWS = 100


@dataclass(frozen=True)
class Row:
    """One clip under one plan."""

    clip: str
    plan: str
    ranks: int
    step_s: float
    """Median wall time of a guided step on rank 0."""
    min_s: float
    max_s: float
    alone_s: float | None
    """The same step on rank 0 alone; None where it is alone anyway."""
    efficiency: float | None
    """alone_s / (ranks x step_s)."""
    tflop: float
    """Operations of a step on all ranks together."""
    tflop_per_s_per_gpu: float
    floor_s: float
    """Operations of the rank with the most work, each kind at the rate measured alone in the same run."""
    peak_gib: float | None
    """Most memory allocated on rank 0's GPU."""
    collective_s: float | None
    """Device time of rank 0's collectives in a step, waiting for the other ranks included."""
    exposed_collective_s: float | None
    """The part of it during which nothing else ran on rank 0's GPU."""
    first_step_s: float
    """Predictor made and first step: compiling and choice of kernels, as far as no step before has done it."""
    second_step_s: float
    """Recording of graphs."""
    relative_error: float | None
    """Largest difference of a prediction from rank 0's alone, as a part of its norm."""


@dataclass(frozen=True)
class Machine:
    """What a run measures on."""

    device: torch.device
    selected: SelectedOps
    execution: Execution
    rates: Rates
    repeats: int


@dataclass(frozen=True)
class Subject:
    """One clip and a model, ready to be stepped."""

    model: FusionModel
    rope: RopeTables
    latents: Latents
    conditions: Conditions
    timestep: torch.Tensor

    @classmethod
    def make(cls, model: FusionModel, clip: Clip, device: torch.device) -> Subject:
        """Seeded noise and texts, the same on every rank."""
        noise = draw_noise((48, clip.frames, clip.height, clip.width), (clip.audio_length, 20), 0)
        generator = torch.Generator().manual_seed(1)
        shape = (_PROMPT_ROWS, model.config.text_dim)
        texts = [torch.randn(shape, generator=generator).to(device) for _ in range(3)]
        return cls(
            model,
            model.rope_tables((clip.frames, clip.height, clip.width), clip.audio_length).to(device),
            Latents(noise.video_CFHW.to(device), noise.audio_SC.to(device)),
            Conditions(*model.encode_texts([(texts[0], texts[0]), (texts[1], texts[2])]), None),
            torch.tensor(500.0, device=device),
        )

    def step(self, predict: Predictor) -> tuple[Latents, Latents | None]:
        """Both predictions of a step, finished."""
        result = predict(self.latents, self.timestep, self.conditions, skip_layer=SKIP_LAYER)
        synchronize(self.latents.video_CFHW.device)
        return result


def bind(subject: Subject, machine: Machine, plan: ParallelPlan) -> Predictor:
    """The service's predictor of a plan; a collective if it has several ranks."""
    groups = make_groups(plan) if plan != ALONE else None
    if groups is not None and groups.weights is not None:
        model = sharded_copy(subject.model, groups.weights)
        return make_predictor(model, subject.rope, machine.selected.ops, groups)
    graphs = machine.execution.graphs
    return make_predictor(subject.model, subject.rope, machine.selected.ops, groups, graphs=graphs)


def sharded_copy(model: FusionModel, mesh: DeviceMesh) -> FusionModel:
    """The model with this rank's rows of the weights."""
    weights = model.state_dict()
    copy = sharded_on_meta(model.config, mesh, next(model.parameters()).dtype)
    parts = {
        key: whole_of(weights[key][slice(*own_rows(parameter))].clone(), parameter)
        for key, parameter in copy.state_dict().items()
    }
    assign_weights(copy, parts)
    return copy


@dataclass(frozen=True)
class Steps:
    """A plan's measured steps of one subject."""

    times: Times
    first_step_s: float
    second_step_s: float
    predictions: tuple[Latents, Latents | None]
    peak_gib: float | None
    collectives: CollectiveTimes | None


def run_steps(subject: Subject, machine: Machine, plan: ParallelPlan, repeats: int) -> Steps:
    """Steps after a warm-up, then one under the profiler if there are collectives; on all ranks."""
    cuda = machine.device.type == "cuda"
    if dist.is_initialized():
        dist.barrier()
    gc.collect()  # sharded models refer to themselves
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin_s = time.perf_counter()
    predict = bind(subject, machine, plan)
    predictions = subject.step(predict)
    first_step_s = time.perf_counter() - begin_s
    seconds = []
    for _ in range(1 + WARM_UP + repeats):
        begin_s = time.perf_counter()
        subject.step(predict)
        seconds.append(time.perf_counter() - begin_s)
    times, second_step_s = Times.of(seconds[1 + WARM_UP :]), seconds[0]
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    if peak_gib is not None and plan.weights_degree > 1:
        # The whole model is there for the comparison alone.
        peak_gib -= sum(value.nbytes for value in subject.model.state_dict().values()) / 2**30
    collectives = profile_collectives(lambda: subject.step(predict)) if cuda and plan != ALONE else None
    return Steps(times, first_step_s, second_step_s, predictions, peak_gib, collectives)


def step_work(
    config: FusionConfig, clip: Clip, plan: ParallelPlan, rates: Rates, weights: WeightFormat
) -> tuple[float, float]:
    """Operations of a step on all ranks in TFLOP, and its floor in seconds; the negative pass leaves out one layer."""
    products, attention = count_flop(config, clip)
    passes = 2 - 1 / config.num_layers
    most = (1 if plan.guidance_degree == 2 else passes) / plan.sequence_degree
    products_s = products / rates.product_flop_per_s
    if weights is WeightFormat.FP8 and rates.fp8_product_flop_per_s is not None:
        # The first and the last block keep their precision, see services.fusion.quantization.
        kept = 2 / config.num_layers
        products_s = kept * products_s + (1 - kept) * products / rates.fp8_product_flop_per_s
    return passes * (products + attention) / 1e12, most * (products_s + attention / rates.attention_flop_per_s)


def relative_error(ours: tuple[Latents, Latents | None], alone: tuple[Latents, Latents | None]) -> float:
    """The largest of the four predictions' ‖ours - alone‖ / ‖alone‖."""
    errors = []
    for mine, theirs in zip(ours, alone, strict=True):
        assert mine is not None and theirs is not None
        pairs = ((mine.video_CFHW, theirs.video_CFHW), (mine.audio_SC, theirs.audio_SC))
        errors += [float((a - b).norm() / b.norm()) for a, b in pairs]
    return max(errors)


def make_row(name: str, work: tuple[float, float], plan: ParallelPlan, steps: Steps, alone: Steps | None) -> Row:
    """One line of the table."""
    tflop, floor_s = work
    step_s, ranks = steps.times.median_s, plan.world_size
    return Row(
        clip=name,
        plan=plan.describe(),
        ranks=ranks,
        step_s=step_s,
        min_s=steps.times.min_s,
        max_s=steps.times.max_s,
        alone_s=alone.times.median_s if alone else None,
        efficiency=alone.times.median_s / (ranks * step_s) if alone else None,
        tflop=tflop,
        tflop_per_s_per_gpu=tflop / step_s / ranks,
        floor_s=floor_s,
        peak_gib=steps.peak_gib,
        collective_s=steps.collectives.total_s if steps.collectives else None,
        exposed_collective_s=steps.collectives.exposed_s if steps.collectives else None,
        first_step_s=steps.first_step_s,
        second_step_s=steps.second_step_s,
        relative_error=relative_error(steps.predictions, alone.predictions) if alone else None,
    )


def measure_clip(
    name: str, clip: Clip, model: FusionModel, machine: Machine, plans: list[ParallelPlan]
) -> Iterator[Row]:
    """Every plan on one clip; on all ranks."""
    subject = Subject.make(model, clip, machine.device)
    together = any(plan != ALONE for plan in plans)
    alone = run_steps(subject, machine, ALONE, _ALONE_REPEATS) if together else None
    for plan in plans:
        steps = run_steps(subject, machine, plan, machine.repeats)
        work = step_work(model.config, clip, plan, machine.rates, machine.execution.weights)
        yield make_row(name, work, plan, steps, alone if plan != ALONE else None)


def make_model(config: FusionConfig, machine: Machine, dtype: torch.dtype) -> FusionModel:
    """A random model, prepared as the service prepares a loaded one."""
    model = random_model(config, machine.device, dtype)
    quantize(model, machine.execution.weights)
    if machine.selected.fused:
        pack_projections(model)
    synchronize(machine.device)
    return model


def variant_of(execution: Execution) -> str:
    """What differs from the services' default, in words; empty if nothing does."""
    default = Execution()
    words = [execution.weights.value] if execution.weights is not default.weights else []
    words += [execution.kernels.value] if execution.kernels is not default.kernels else []
    words += ["graphs" if execution.graphs else "no graphs"] if execution.graphs is not default.graphs else []
    return " ".join(words)


def parse_plans(text: str, world_size: int, num_heads: int) -> list[ParallelPlan]:
    """Plans for this number of ranks.

    Raises:
        ValueError: one needs another number of ranks, or does not fit the heads.
    """
    plans = []
    for word in text.split(","):
        degrees = word.removeprefix("fsdp:")
        plan = (
            ParallelPlan.auto(world_size, num_heads) if word == "auto" else ParallelPlan(*map(int, degrees.split("x")))
        )
        plan = replace(plan, weights_degree=plan.world_size if degrees != word else 1)
        plan.require_heads(num_heads)
        if plan.world_size not in (1, world_size):
            raise ValueError(f"--plans: {word} needs {plan.world_size} ranks, there are {world_size}")
        plans.append(plan)
    return plans


def _say(what: object) -> None:
    """Print on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write(f"{what}\n")
        sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clips", default=",".join(CLIPS))
    add("--plans", default="auto")
    add("--kernels", choices=[kernels.value for kernels in Kernels], default="auto")
    add("--graphs", action=argparse.BooleanOptionalAction, help="record steps as CUDA graphs (default: as the service)")
    add("--weights", choices=[weights.value for weights in WeightFormat], default="native", help="of the wide layers")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--preset", choices=["full", "tiny"], default="full")
    add("--repeats", type=int, default=5)
    add("--profile", action="store_true", help="print the costliest kernels of a step of the first clip")
    add("--save", action="store_true", help="keep the result in benchmarks/results")
    add("--json", type=Path, help="keep the result in this file")
    return parser


@torch.inference_mode()
def main() -> None:
    """Measure; print on rank 0."""
    args = _parser().parse_args()
    ranks = Ranks.from_environment(os.environ)
    device = rank_device(torch.device(args.device), ranks)
    fellowship = join_group(ranks, device) if ranks.world_size > 1 else None
    chosen = preset(args.preset)
    plans = parse_plans(args.plans, ranks.world_size, chosen.config.num_heads)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    execution = Execution(Kernels(args.kernels), args.graphs, WeightFormat(args.weights))
    selected = select_ops(device, dtype, execution.kernels)
    machine = Machine(device, selected, execution, measure_rates(device, dtype), args.repeats)
    if cuda:
        torch.cuda.empty_cache()
    begin_s = time.perf_counter()
    model = make_model(chosen.config, machine, dtype)
    described = describe_run("fusion", device, ranks.world_size, args, variant_of(execution)) | {
        "preset": args.preset,
        "kernels": selected.name,
        "rates": asdict(machine.rates),
        "model_made_s": time.perf_counter() - begin_s,
    }
    _say(described)
    rows = []
    names = args.clips.split(",")
    for name in names:
        for row in measure_clip(name, chosen.clips[name], model, machine, plans):
            rows.append(row)
            _say(row)
    if args.profile:
        subject = Subject.make(model, chosen.clips[names[0]], device)
        predict = bind(subject, machine, plans[0])
        subject.step(predict)
        _say(costliest(lambda: subject.step(predict), device))
    if ranks.rank == 0 and (args.save or args.json):
        save_result(args.json or result_path(described), described, rows)
    if fellowship is not None:
        fellowship.leave()


if __name__ == "__main__":
    main()
