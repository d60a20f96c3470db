"""Time one forward of the fusion model at released widths with random weights on one GPU.

`python -m benchmarks.fusion [--clips 720x720_5s,...] [--kernels reference] [--repeats 5] [--profile] [--json FILE]`
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from services.fusion.attention import select_attention
from services.fusion.checkpoint import build, layout
from services.fusion.model.config import PATCH_AREA, RELEASED, FusionConfig
from services.fusion.model.fusion import FusionModel, TextCache
from services.fusion.model.layers import Ops
from services.fusion.ops import Kernels, select_ops


@dataclass(frozen=True)
class Clip:
    """Latent shape of a clip."""

    frames: int
    height: int
    width: int
    audio_length: int

    @property
    def video_tokens(self) -> int:
        """Tokens of the video tower."""
        return self.frames * self.height * self.width // PATCH_AREA


CLIPS = {
    "720x720_5s": Clip(31, 46, 44, 157),
    "960x960_5s": Clip(31, 60, 60, 157),
    "960x960_10s": Clip(61, 60, 60, 314),
}


@dataclass(frozen=True)
class Row:
    """One measured clip."""

    clip: str
    seconds: float
    tflop: float
    tflop_per_s: float
    floor_s: float
    peak_gib: float


def count_flop(config: FusionConfig, clip: Clip) -> tuple[float, float]:
    """Operations of one forward in (products, attention), a multiply-add counted as two; text K/V not included."""
    video, audio, text, dim = clip.video_tokens, clip.audio_length, config.text_len, config.dim
    products = 2 * (video + audio) * (8 * dim * dim + 2 * dim * config.ffn_dim)
    pairs = video**2 + audio**2 + (video + audio) * text + 2 * video * audio
    return config.num_layers * products, config.num_layers * 4.0 * pairs * dim


def random_model(config: FusionConfig, device: torch.device) -> FusionModel:
    """The model with small normal weights, made on the device."""
    torch.manual_seed(0)
    weights = {}
    for key, (dtype, shape) in layout(config).items():
        weights[key] = torch.randn(shape, device=device, dtype=dtype).mul_(0.02)
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1
    return build(config, weights)


def measure_rates(device: torch.device) -> tuple[float, float, float]:
    """This GPU's bf16 product FLOP/s (8192^3), attention FLOP/s (24 heads of 128, 16384 tokens), copy bytes/s."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / median_seconds(lambda: a @ b, 10)
    kernel = select_attention(device, torch.bfloat16)
    q, k, v = (torch.randn(16384, 24, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    attention = 4 * 16384**2 * 3072 / median_seconds(lambda: kernel.call(q, k, v), 10)
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * (1 << 30) / median_seconds(lambda: target.copy_(source), 10)
    return product, attention, copy


def median_seconds(call: object, repeats: int) -> float:
    """Median device time of a call over `repeats`, after two warm-up calls."""
    assert callable(call)
    times = []
    for index in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


class Forward:
    """One forward of a clip, ready to be called."""

    def __init__(self, model: FusionModel, clip: Clip, ops: Ops, device: torch.device) -> None:
        dtype = torch.bfloat16
        self._model, self._ops = model, ops
        self._video = torch.randn(48, clip.frames, clip.height, clip.width, device=device)
        self._audio = torch.randn(clip.audio_length, 20, device=device)
        self._timestep = torch.tensor(500.0, device=device)
        prompt = torch.randn(100, model.config.text_dim, device=device, dtype=dtype)
        self._rope = model.rope_tables((clip.frames, clip.height, clip.width), clip.audio_length).to(device)
        self._text: TextCache = model.encode_text(prompt, prompt)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model(self._video, self._audio, self._timestep, self._text, self._rope, self._ops)


def profile(forward: Forward) -> str:
    """The 25 kernels that take the most device time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        forward()
        torch.cuda.synchronize()
    return prof.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=80)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", default=",".join(CLIPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", choices=[kernels.value for kernels in Kernels], default="auto")
    parser.add_argument("--profile", action="store_true", help="print the costliest kernels of the first clip")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    selected = select_ops(device, torch.bfloat16, Kernels(args.kernels))
    product_rate, attention_rate, copy_rate = measure_rates(device)
    torch.cuda.empty_cache()
    rates = {
        "product_tflop_per_s": product_rate / 1e12,
        "attention_tflop_per_s": attention_rate / 1e12,
        "copy_tb_per_s": copy_rate / 1e12,
    }
    out = sys.stdout.write
    name = torch.cuda.get_device_name(device)
    out(f"{name}, torch {torch.__version__}, {selected.name}, {rates}\n")
    model = random_model(RELEASED, device)
    rows = []
    for clip_name in args.clips.split(","):
        clip = CLIPS[clip_name]
        torch.cuda.reset_peak_memory_stats()
        forward = Forward(model, clip, selected.ops, device)
        seconds = median_seconds(forward, args.repeats)
        products, attention = count_flop(RELEASED, clip)
        floor = products / product_rate + attention / attention_rate
        tflop = (products + attention) / 1e12
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append(Row(clip_name, seconds, tflop, tflop / seconds, floor, peak))
        out(f"{rows[-1]}\n")
        if args.profile and len(rows) == 1:
            out(profile(forward))
    if args.json:
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": name,
            "torch": torch.__version__,
            "kernels": selected.name,
            "rates": rates,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
