"""Time the video VAE's decoder in stripes on several GPUs, at released widths with random weights.

`torchrun --standalone --nproc-per-node 4 -m benchmarks.vae_ranks [--clips 720x720_5s,...] [--repeats 3] [--mp4]
[--save | --json FILE]`. Rank 0 alone is measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.common import describe_run, result_path, save_result, synchronize
from benchmarks.vae import (
    CLIPS,
    Clip,
    Rates,
    count_flop,
    mp4_seconds,
    parse_flags,
    set_up,
    shapes_only,
)
from services.vae.model.video_vae import VideoVae
from services.vae.parallel import RankStripe, connect_ranks, decode_striped, stripe_heights
from shared.group.control import ControlChannel
from shared.group.ranks import Ranks, join_group, rank_device

_ERROR_FRAMES = 5
"""Latent frames whose pictures are compared with those of one rank."""


@dataclass(frozen=True)
class Row:
    """One measured clip, as rank 0 sees it."""

    clip: str
    ranks: int
    first_s: float
    """Of the first decode at this size."""
    seconds: float
    """Median of the whole clip: latent on every device to levels on the first."""
    alone_s: float
    """The same of rank 0 alone, the others idle."""
    efficiency: float
    """alone_s / (ranks * seconds)."""
    communication_s: float | None
    """In sends and receives, what they wait for the other rank included; None on a CPU."""
    mp4_seconds: float | None
    """Median of the whole clip, to the finished mp4."""
    tflop_per_s: float
    """Of the operations done, all ranks together."""
    percent_of_ceiling: float
    floor_s: float
    """Operations done over the rate of convolutions of all ranks."""
    peak_gib: float | None
    relative_error: float
    """Norm of the difference of the pictures from those of rank 0 alone, over its norm."""
    largest_level_error: int
    """Of levels 0 to 255."""


@dataclass(frozen=True)
class Machine:
    """What the ranks of a run share."""

    ranks: Ranks
    device: torch.device
    channel: ControlChannel
    rates: Rates


def measure(vae: VideoVae, name: str, clip: Clip, machine: Machine, repeats: int, *, mp4: bool) -> Row:
    """Decode a clip of random latents again and again; on all ranks, of which rank 0 has the row."""
    device = machine.device
    generator = torch.Generator().manual_seed(0)
    latent_CFHW = torch.randn(vae.config.z_dim, *clip.video_shape, generator=generator).to(device)

    def whole() -> Iterator[torch.Tensor]:
        return vae.decode(latent_CFHW, torch.uint8) if machine.ranks.rank == 0 else iter(())

    def striped() -> Iterator[torch.Tensor]:
        return decode_striped(vae, latent_CFHW)

    _, *alone = [_timed(whole, machine) for _ in range(1 + repeats)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first_s, *together = [_timed(striped, machine) for _ in range(1 + repeats)]
    seconds, alone_s = statistics.median(together), statistics.median(alone)
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    error, level_error = compare(vae, latent_CFHW[:, :_ERROR_FRAMES], machine.ranks)
    world_size = machine.ranks.world_size
    done = count_flop(vae.config, shapes_only(vae.decoder.ops), clip.video_shape) / 1e12
    ceiling = machine.rates.convolution_tflop_per_s * world_size
    return Row(
        clip=name,
        ranks=world_size,
        first_s=first_s,
        seconds=seconds,
        alone_s=alone_s,
        efficiency=alone_s / seconds / world_size,
        communication_s=communication_seconds(lambda: _timed(striped, machine), device),
        mp4_seconds=_mp4_seconds(vae, name, machine, repeats) if mp4 else None,
        tflop_per_s=done / seconds,
        percent_of_ceiling=100 * done / seconds / ceiling,
        floor_s=done / ceiling,
        peak_gib=peak_gib,
        relative_error=error,
        largest_level_error=level_error,
    )


def compare(vae: VideoVae, latent_CFHW: torch.Tensor, ranks: Ranks) -> tuple[float, int]:
    """Relative error of pictures and largest error of levels against one rank alone; 0 on all ranks but the first."""
    heights = stripe_heights(latent_CFHW.shape[2], ranks.world_size)
    pictures = torch.empty(0)
    if heights[ranks.rank]:
        stripe = RankStripe(heights)
        rows_CFHW = latent_CFHW.split([*heights], dim=2)[ranks.rank]
        pictures = torch.cat([stripe.collect(part) for part in vae.decode(rows_CFHW, torch.float32, stripe)])
    levels = torch.cat(list(decode_striped(vae, latent_CFHW)))
    if ranks.rank > 0:
        return 0.0, 0
    expected = torch.cat(list(vae.decode(latent_CFHW, torch.float32)))
    expected_levels = torch.cat(list(vae.decode(latent_CFHW, torch.uint8)))
    error = (pictures - expected).norm() / expected.norm()
    return error.item(), int((levels.int() - expected_levels.int()).abs().max())


def communication_seconds(decode: Callable[[], object], device: torch.device) -> float | None:
    """Device time of sends and receives in one decode; None on a CPU. All ranks call it."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        decode()
    return sum(event.self_device_time_total for event in prof.key_averages() if "nccl" in event.key.lower()) / 1e6


def _timed(decode: Callable[[], Iterator[torch.Tensor]], machine: Machine) -> float:
    """Seconds until the device has done it; all ranks begin together."""
    synchronize(machine.device)
    machine.channel.agree(True)
    begun_s = time.perf_counter()
    for _ in decode():
        pass
    synchronize(machine.device)
    return time.perf_counter() - begun_s


def _mp4_seconds(vae: VideoVae, clip: str, machine: Machine, repeats: int) -> float:
    # Imported here: it needs PyAV, which not every host has.
    from services.vae.group import decode_as_told, led_pictures

    channel = machine.channel
    if machine.ranks.rank == 0:
        return mp4_seconds(vae, clip, repeats, led_pictures(vae, channel))
    for _ in range(repeats + 1):
        decode_as_told(vae, channel.receive(), channel)
    return 0.0


@torch.inference_mode()
def main() -> None:
    """Measure; print on rank 0."""
    args = parse_flags(__doc__, lambda parser: None)
    ranks = Ranks.from_environment(os.environ)
    device = rank_device(torch.device("cuda", 0), ranks)
    fellowship = join_group(ranks, device)
    connect_ranks(device)
    made = set_up(args, device)
    machine = Machine(ranks, device, fellowship.channel, made.rates)
    described = describe_run("vae", device, ranks.world_size, args) | made.describe()
    rows = []
    for name in args.clips.split(","):
        torch.cuda.empty_cache()
        rows.append(measure(made.vae, name, CLIPS[name], machine, args.repeats, mp4=args.mp4))
        if ranks.rank == 0:
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    if ranks.rank == 0 and (args.save or args.json):
        save_result(args.json or result_path(described), described, rows)
    fellowship.leave()


if __name__ == "__main__":
    main()
