"""Time the video VAE's decoder at released widths with random weights on one GPU.

`python -m benchmarks.vae [--clips 720x720_5s,...] [--kernels reference] [--latent-frames-per-step 2] [--repeats 3]
[--mp4] [--profile] [--save]`
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import describe_run, result_path, save_result
from services.vae.checkpoint import RELEASED_AUDIO_VAE, RELEASED_VOCODER, assemble_video_vae
from services.vae.model.audio_vae import AudioVae
from services.vae.model.video_decoder import VideoDecoder
from services.vae.model.video_layers import Ops, ReferenceOps
from services.vae.model.video_vae import RELEASED_VIDEO_VAE, VideoVae, VideoVaeConfig, wan_network
from services.vae.model.vocoder import Vocoder
from services.vae.ops import FusedOps, Kernels, select_ops

if TYPE_CHECKING:
    from services.vae.decoding import PictureSource


@dataclass(frozen=True)
class Clip:
    """Latent shape of a clip."""

    frames: int
    height: int
    width: int
    audio_length: int

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return self.frames, self.height, self.width


CLIPS = {
    "720x720_5s": Clip(31, 46, 44, 157),
    "960x960_5s": Clip(31, 60, 60, 157),
    "960x960_10s": Clip(61, 60, 60, 314),
}
_ERROR_SHAPE = (3, 24, 32)
"""Latent frames, rows and columns of the comparison with float32."""


@dataclass(frozen=True)
class Rates:
    """Ceilings of this GPU, measured here."""

    convolution_tflop_per_s: float
    """3x3x3, 512 channels, 4 frames of 240x240, bf16, channels innermost: the decoder's dominant shape."""
    copy_tb_per_s: float
    """Bytes read and written."""


@dataclass(frozen=True)
class Row:
    """One measured clip; floors are operations over the rate of convolutions."""

    clip: str
    first_s: float
    """Of the first decode at this size: kernels are compiled, or read from Triton's cache, and cuDNN plans."""
    seconds: float
    """Median of the whole clip: latent on the device to levels on the device."""
    mp4_seconds: float | None
    """Median of the whole clip, to the finished mp4."""
    tflop: float
    """Operations of the network as it is defined."""
    tflop_done: float
    """Operations of the implementation."""
    tflop_per_s: float
    """Of the operations done."""
    percent_of_ceiling: float
    floor_s: float
    """Of the operations done."""
    floor_as_defined_s: float
    peak_gib: float


def random_network(config: VideoVaeConfig, device: torch.device) -> Any:
    """A network whose activations stay near unit size: normal weights scaled by their fan-in, gains of one."""
    with torch.device("meta"):
        network: Any = wan_network(config)
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("gamma"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.05, generator=generator)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return network.eval()


def count_flop(config: VideoVaeConfig, ops: Ops, latent_shape: tuple[int, int, int]) -> float:
    """Operations of decoding a clip, a multiply-add counted as two, from the shapes of a run without data."""
    device = torch.device("meta")
    with device:
        network = wan_network(config)
    decoder = VideoDecoder(network, ops, device, torch.bfloat16)
    latent_FHWC = torch.empty(*latent_shape, config.z_dim, dtype=torch.bfloat16, device=device)
    with FlopCounterMode(display=False) as counter:
        for _ in decoder.stream(latent_FHWC, torch.uint8):
            pass
    return float(counter.get_total_flops())


class _NoKernels:
    """Passes between products, without the passes."""

    @staticmethod
    def join(*_: object) -> None:
        """Writes nothing."""

    @staticmethod
    def pixels(*_: object) -> None:
        """Writes nothing."""


def shapes_only(ops: Ops) -> Ops:
    """The same operations, for tensors without data."""
    if not isinstance(ops, FusedOps):
        return ops
    return FusedOps(_NoKernels, latent_frames_per_step=ops.latent_frames_per_step)


def measure_rates(device: torch.device) -> Rates:
    """See `Rates`."""
    x = torch.randn(1, 6, 240, 240, 512, device=device, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)
    weight = torch.randn(512, 512, 3, 3, 3, device=device, dtype=torch.bfloat16).mul_(0.01)
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    ones = [1, 1, 1]
    seconds = median_seconds(
        lambda: torch.cudnn_convolution(x, weight, [0, 1, 1], ones, ones, 1, True, False, False), 10
    )
    convolution = 2 * weight.numel() * 4 * 240**2 / seconds
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * (1 << 29) / median_seconds(lambda: target.copy_(source), 10)
    return Rates(convolution / 1e12, copy / 1e12)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median device time of a call over `repeats`, after one warm-up call."""
    times = []
    for index in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_errors(config: VideoVaeConfig, device: torch.device, all_ops: list[Ops]) -> dict[str, float]:
    """Norm of the difference of the pictures from a float32 decode with the reference operations, over its norm."""
    latent_FHWC = torch.randn(*_ERROR_SHAPE, config.z_dim, device=device)

    def decode(ops: Ops, dtype: torch.dtype) -> torch.Tensor:
        decoder = VideoDecoder(random_network(config, device), ops, device, dtype)
        return torch.cat(list(decoder.stream(latent_FHWC.to(dtype), torch.float32)))

    expected = decode(ReferenceOps(), torch.float32)
    return {ops.name: ((decode(ops, torch.bfloat16) - expected).norm() / expected.norm()).item() for ops in all_ops}


def measure(vae: VideoVae, clip: str, rates: Rates, repeats: int) -> Row:
    """Decode a clip of random latents again and again."""
    latent_CFHW = torch.randn(vae.config.z_dim, *CLIPS[clip].video_shape, device=vae.mean_C111.device)

    def decode() -> None:
        for _ in vae.decode(latent_CFHW, torch.uint8):
            pass

    begun_s = time.monotonic()
    decode()
    torch.cuda.synchronize()
    first_s = time.monotonic() - begun_s
    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(decode, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30
    tflop = count_flop(vae.config, ReferenceOps(), CLIPS[clip].video_shape) / 1e12
    done = count_flop(vae.config, shapes_only(vae.decoder.ops), CLIPS[clip].video_shape) / 1e12
    ceiling = rates.convolution_tflop_per_s
    return Row(
        clip=clip,
        first_s=first_s,
        seconds=seconds,
        mp4_seconds=None,
        tflop=tflop,
        tflop_done=done,
        tflop_per_s=done / seconds,
        percent_of_ceiling=100 * done / seconds / ceiling,
        floor_s=done / ceiling,
        floor_as_defined_s=tflop / ceiling,
        peak_gib=peak,
    )


def mp4_seconds(vae: VideoVae, clip: str, repeats: int, pictures: PictureSource | None = None) -> float:
    """Median seconds to a finished mp4 with sound, of `repeats` after one that is not counted.

    Frames are encoded while further ones are decoded, by `pictures` if not by `vae` alone.
    """
    from services.vae.engine import VaeEngine
    from services.vae.networks import Networks

    device = vae.mean_C111.device
    audio_vae, vocoder = AudioVae(RELEASED_AUDIO_VAE), Vocoder(RELEASED_VOCODER)
    for network in (audio_vae, vocoder):
        network.to(device).requires_grad_(False)
    engine = VaeEngine(Networks(vae, audio_vae, vocoder), pictures=pictures)
    latent_CFHW = torch.randn(vae.config.z_dim, *CLIPS[clip].video_shape)
    audio_SC = torch.randn(CLIPS[clip].audio_length, 20)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            begun_s = time.monotonic()
            for _ in engine.decode_clip(latent_CFHW, audio_SC, {}, Path(folder) / "clip.mp4"):
                pass
            times.append(time.monotonic() - begun_s)
    return statistics.median(times[1:])


def profile(vae: VideoVae, clip: str) -> str:
    """The 30 kernels that take the most device time in five latent frames."""
    latent_CFHW = torch.randn(vae.config.z_dim, 5, *CLIPS[clip].video_shape[1:], device=vae.mean_C111.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in vae.decode(latent_CFHW, torch.uint8):
            pass
        torch.cuda.synchronize()
    return prof.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=100)


@dataclass(frozen=True)
class SetUp:
    """What is measured, and what this GPU can do."""

    vae: VideoVae
    rates: Rates
    weights_s: float
    """Seconds to make random weights and to lay them out."""

    def describe(self) -> dict[str, Any]:
        """For the result's file."""
        ops = self.vae.decoder.ops
        per_step = ops.latent_frames_per_step
        return {"kernels": ops.name, "latent_frames_per_step": per_step, "rates": asdict(self.rates)}


def parse_flags(description: str | None, more: Callable[[argparse.ArgumentParser], object]) -> argparse.Namespace:
    """The flags that all measurements of the decoder have, and those that `more` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--clips", default=",".join(CLIPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", choices=[kernels.value for kernels in Kernels], default="auto")
    parser.add_argument("--latent-frames-per-step", type=int)
    parser.add_argument("--mp4", action="store_true", help="time whole clips with sound and encoding too; needs PyAV")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--json", type=Path, help="keep the result in this file")
    more(parser)
    return parser.parse_args()


def set_up(args: argparse.Namespace, device: torch.device) -> SetUp:
    """Measure the GPU, then make the decoder of released widths that the flags ask for."""
    torch.backends.cudnn.allow_tf32 = False
    rates = measure_rates(device)
    torch.cuda.empty_cache()
    ops = select_ops(device, Kernels(args.kernels))
    if args.latent_frames_per_step is not None:
        ops.latent_frames_per_step = args.latent_frames_per_step
    begun_s = time.monotonic()
    network = random_network(RELEASED_VIDEO_VAE, device)
    vae = assemble_video_vae(RELEASED_VIDEO_VAE, network, device, torch.bfloat16, ops)
    torch.cuda.synchronize()
    return SetUp(vae, rates, time.monotonic() - begun_s)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    args = parse_flags(
        __doc__,
        lambda parser: parser.add_argument(
            "--profile", action="store_true", help="print the costliest kernels of the first clip"
        ),
    )
    device = torch.device("cuda", 0)
    out = sys.stdout.write
    made = set_up(args, device)
    vae, ops = made.vae, made.vae.decoder.ops
    out(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {made.describe()}\n")
    out(f"weights made and laid out in {made.weights_s:.2f} s\n")
    errors = measure_errors(
        RELEASED_VIDEO_VAE, device, [ReferenceOps()] if ops.name == "reference" else [ReferenceOps(), ops]
    )
    out(f"relative error against float32: {errors}\n")
    rows = []
    for clip in args.clips.split(","):
        torch.cuda.empty_cache()
        rows.append(measure(vae, clip, made.rates, args.repeats))
        out(f"{rows[-1]}\n")
        if args.profile and len(rows) == 1:
            out(profile(vae, clip))
        if args.mp4:
            rows[-1] = replace(rows[-1], mp4_seconds=mp4_seconds(vae, clip, args.repeats))
            out(f"{clip}: {rows[-1].mp4_seconds:.3f} s to a finished mp4\n")
    if args.save or args.json:
        variant = "" if args.kernels == Kernels.AUTO.value else args.kernels
        described = describe_run("vae", device, 1, args, variant) | made.describe()
        described |= {"weights_s": made.weights_s, "relative_error_against_float32": errors}
        save_result(args.json or result_path(described), described, rows)


if __name__ == "__main__":
    main()
