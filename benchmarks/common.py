"""What several benchmarks share: clips, models with random weights, this machine's ceilings, times, result files."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from cli.checkpoints.presets import PRESETS
from services.fusion.attention import select_attention
from services.fusion.checkpoint import build, layout
from services.fusion.model.config import PATCH_AREA, FusionConfig
from services.fusion.model.fusion import FusionModel
from services.fusion.quantization import FP8, has_fp8_products

RESULTS = Path(__file__).parent / "results"
_CPU_INFO = Path("/proc/cpuinfo")
WARM_UP = 2
"""Calls before those that are timed."""


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
TINY_CLIPS = {name: Clip(clip.frames, 6, 6, clip.audio_length) for name, clip in CLIPS.items()}
"""Those of the tiny preset, whose pictures are 96 x 96."""


@dataclass(frozen=True)
class Preset:
    """Widths of a model and its clips."""

    config: FusionConfig
    clips: dict[str, Clip]


def preset(name: str) -> Preset:
    """`full`: the released widths; `tiny`: those of the tiny checkpoint."""
    return Preset(PRESETS[name].fusion, CLIPS if name == "full" else TINY_CLIPS)


@dataclass(frozen=True)
class Rates:
    """What this machine reaches in one operation alone."""

    product_flop_per_s: float
    attention_flop_per_s: float
    copy_bytes_per_s: float
    fp8_product_flop_per_s: float | None
    """With a scale for every row; None where the device has no fp8 products."""


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls."""

    median_s: float
    min_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Of at least one call."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def count_flop(config: FusionConfig, clip: Clip) -> tuple[float, float]:
    """Operations of one pass in (products, attention), a multiply-add counted as two; text K/V not included."""
    video, audio, text, dim = clip.video_tokens, clip.audio_length, config.text_len, config.dim
    products = 2 * (video + audio) * (8 * dim * dim + 2 * dim * config.ffn_dim)
    pairs = video**2 + audio**2 + (video + audio) * text + 2 * video * audio
    return config.num_layers * products, config.num_layers * 4.0 * pairs * dim


def random_model(config: FusionConfig, device: torch.device, dtype: torch.dtype | None = None) -> FusionModel:
    """The model with small normal weights, made on the device; bfloat16 as in a released file unless told otherwise."""
    torch.manual_seed(0)
    weights = {}
    for key, (stored, shape) in layout(config).items():
        weights[key] = torch.randn(shape, device=device, dtype=dtype or stored).mul_(0.02)
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1
    return build(config, weights)


def measure_rates(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Rates:
    """Product of 8192^3, attention with 24 heads of 128 and 16384 tokens, copy of 4 GiB; far smaller ones on a CPU."""
    cuda = device.type == "cuda"
    side, tokens, values = (8192, 16384, 1 << 30) if cuda else (512, 512, 1 << 24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = time_calls(lambda: a @ b, 10, device).median_s
    kernel = select_attention(device, dtype)
    q, k, v = (torch.randn(tokens, 24, 128, device=device, dtype=dtype) for _ in range(3))
    attention_s = time_calls(lambda: kernel.call(q, k, v), 10, device).median_s
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    copy_s = time_calls(lambda: target.copy_(source), 10, device).median_s
    return Rates(
        2 * side**3 / product_s,
        4 * tokens**2 * 24 * 128 / attention_s,
        2 * 4 * values / copy_s,
        _fp8_rate(side, device) if has_fp8_products(device) else None,
    )


def _fp8_rate(side: int, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    scale = torch.ones(side, 1, device=device)

    def product() -> torch.Tensor:
        scales = {"scale_a": scale, "scale_b": scale.t()}
        return torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * side**3 / time_calls(product, 10, device).median_s


def time_calls(call: Callable[[], object], repeats: int, device: torch.device) -> Times:
    """Seconds of a call on the device, after two warm-up calls."""
    seconds = [_call_seconds(call, device) for _ in range(WARM_UP + repeats)]
    return Times.of(seconds[WARM_UP:])


def _call_seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin_s = time.perf_counter()
        call()
        return time.perf_counter() - begin_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median device time of a call on the current GPU over `repeats`, after two warm-up calls."""
    return time_calls(call, repeats, torch.device("cuda")).median_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware_slug(title: str) -> str:
    """Name of the hardware in file names: "NVIDIA H200" is h200."""
    words = [word for word in re.findall(r"[a-z0-9]+", title.lower()) if word not in ("nvidia", "geforce", "tesla")]
    return "-".join(words)


def processor_title() -> str:
    """Model of this machine's processor, and how many cores of it there are for this process."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    model = next((line.partition(":")[2] for line in lines if line.startswith("model name")), platform.machine())
    plain = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*", "", model)
    return f"{' '.join(plain.split())}, {len(psutil.Process().cpu_affinity() or ())} cores"


def describe_run(
    kind: str, device: torch.device, gpus: int, options: argparse.Namespace, variant: str = ""
) -> dict[str, Any]:
    """What every result file says of itself.

    Args:
        kind: which table the rows belong to.
        device: one of those that were used.
        gpus: how many of them took part; ranks on a CPU; 0: of a benchmark that computes nothing with tensors.
        options: the command's; those that name files are left out.
        variant: switches that differ from what the services choose, in words.
    """
    now = datetime.datetime.now(datetime.UTC)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_title()
    return {
        "kind": kind,
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M:%S"),
        "device": title,
        "gpus": gpus,
        "variant": variant,
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
    }


def result_path(described: dict[str, Any]) -> Path:
    """Where a run's result is kept: named by kind, hardware, variant and date."""
    words = [described["kind"], hardware_slug(described["device"])]
    words += [f"{described['gpus']}gpu"] if described["gpus"] else []
    words += [described["variant"].replace(" ", "-")] if described["variant"] else []
    return RESULTS / f"{'_'.join(words)}_{described['date']}.json"


def save_result(path: Path, described: dict[str, Any], rows: list[Any]) -> None:
    """Write a result file; rows are dataclasses."""
    content = described | {"rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
