"""Time guided steps with one technique switched off at a time, random weights, on one GPU.

`python -m benchmarks.switches [--clips 720x720_5s] [--repeats 5] [--save]`
`... --device cpu --preset tiny` runs the switches that a CPU has.

What a technique gains is what a step costs more without it; its drift is how far the predictions without it are from
those with all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import WARM_UP, Times, describe_run, preset, random_model, result_path, save_result
from benchmarks.fusion import Subject, relative_error
from services.fusion.model import operations
from services.fusion.model.operations import Ops, TowerOps
from services.fusion.ops import Kernels, select_ops
from services.fusion.packing import pack_projections
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.sampling.denoise import Latents


@dataclass(frozen=True)
class Ways:
    """How a step is made."""

    ops: Ops
    shares_first_half: bool = True

    def without(self, **changes: object) -> Ways:
        """The same with other operations in both towers."""
        video, audio = (replace(tower, **changes) for tower in (self.ops.video, self.ops.audio))
        return replace(self, ops=self.ops._replace(video=video, audio=audio))


Switch = Callable[[Ways], Ways]

SWITCHES: dict[str, Switch] = {
    "residual, gate and norms in one pass": lambda ways: ways.without(residual_norms=operations.residual_norms),
    "norm and rotation in one pass": lambda ways: ways.without(
        norm_rope=operations.norm_rope, norm_and_rope=operations.norm_and_rope
    ),
    "text and audio attended to in one pass, padding once": lambda ways: ways.without(joint_attention=None),
    "q, k, v and k, v of the fusion as one product": lambda ways: ways.without(linears=operations.linears),
    "GELU as the product leaves the chip": lambda ways: ways.without(feed_forward=operations.feed_forward),
    "audio tower on a stream of its own": lambda ways: replace(
        ways, ops=ways.ops._replace(together=operations.in_turn)
    ),
    "first self-attention shared by both passes": lambda ways: replace(ways, shares_first_half=False),
}


@dataclass(frozen=True)
class Row:
    """One technique on one clip."""

    clip: str
    technique: str
    step_s: float
    """Without it."""
    all_s: float
    """With all of them."""
    relative_error: float


def step_times(subject: Subject, ways: Ways, repeats: int) -> tuple[Times, tuple[Latents, Latents | None]]:
    """Wall times of steps after warm-up, and the predictions."""
    subject.model.shares_first_half = ways.shares_first_half
    predict = make_predictor(subject.model, subject.rope, ways.ops, None)
    seconds = []
    for _ in range(WARM_UP + repeats):
        begin_s = time.perf_counter()
        predictions = subject.step(predict)
        seconds.append(time.perf_counter() - begin_s)
    return Times.of(seconds[WARM_UP:]), predictions


def plain(ways: Ways) -> Ways:
    """Every technique off; the attention kernel stays."""
    attention = ways.ops.audio.self_attention
    tower = TowerOps(attention, attention, attention)
    return Ways(Ops(tower, tower), shares_first_half=False)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", default="720x720_5s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--preset", choices=["full", "tiny"], default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--json", type=Path, help="keep the result in this file")
    args = parser.parse_args()
    device, chosen = torch.device(args.device), preset(args.preset)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    selected = select_ops(device, dtype, Kernels.AUTO)
    model = random_model(chosen.config, device, dtype)
    pack_projections(model)
    described = describe_run("switches", device, 1, args) | {"preset": args.preset, "kernels": selected.name}
    rows = []
    for name in args.clips.split(","):
        subject = Subject.make(model, chosen.clips[name], device)
        everything = Ways(selected.ops)
        times, expected = step_times(subject, everything, args.repeats)
        for technique, switch in {**SWITCHES, "all of these": plain}.items():
            without, predictions = step_times(subject, switch(everything), args.repeats)
            error = relative_error(predictions, expected)
            rows.append(Row(name, technique, without.median_s, times.median_s, error))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    if args.save or args.json:
        save_result(args.json or result_path(described), described, rows)


if __name__ == "__main__":
    main()
