"""Clips decoded in stripes by several gloo ranks are those of one process."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.vae import Clip, Rates
from benchmarks.vae_ranks import Machine, measure
from services.vae.checkpoint import assemble_video_vae, load_audio_vae, load_vocoder
from services.vae.engine import VaeEngine
from services.vae.group import decode_as_told, led_pictures
from services.vae.model.video_layers import ReferenceOps
from services.vae.model.video_vae import VideoVae
from services.vae.networks import Networks
from services.vae.parallel import RankStripe, connect_ranks, decode_striped, stripe_heights
from shared.errors import DiskFull
from shared.group.control import ControlChannel
from shared.group.ranks import Ranks
from shared.variants import AUDIO_VAE_FILE, VOCODER_FILE
from tests.distributed.ranks import run_ranks
from tests.unit.test_vae_decoder import random_network
from tests.vae_checkpoint import SMALL_VIDEO_VAE, write_checkpoint

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""For pictures in [-1, 1] in float32: convolutions over fewer rows add up in another order, some 40 layers deep."""
LATENT_FRAMES = 3


def small_vae() -> VideoVae:
    return assemble_video_vae(SMALL_VIDEO_VAE, random_network(), CPU, torch.float32, ReferenceOps())


def latent(rows: int) -> torch.Tensor:
    return torch.randn(48, LATENT_FRAMES, rows, 4, generator=torch.Generator().manual_seed(rows))


def decode_on_ranks(rows: int) -> dict[str, torch.Tensor]:
    """Levels as the service makes them, and this rank's rows of the pictures before they are rounded."""
    vae = small_vae()
    connect_ranks(CPU)
    heights = stripe_heights(rows, torch.distributed.get_world_size())
    levels = list(decode_striped(vae, latent(rows)))
    if not heights[torch.distributed.get_rank()]:
        return {"levels": torch.cat(levels), "steps": torch.tensor(len(levels))}
    stripe = RankStripe(heights)
    own = latent(rows).split(heights, dim=2)[torch.distributed.get_rank()]
    pictures = [stripe.collect(part) for part in vae.decode(own, torch.float32, stripe)]
    return {"levels": torch.cat(levels), "pictures": torch.cat(pictures), "steps": torch.tensor(len(levels))}


@pytest.mark.parametrize(("world", "rows"), [(2, 4), (3, 8), (3, 2)])
def test_ranks_decode_what_one_process_decodes(world: int, rows: int) -> None:
    """Even stripes, uneven ones, and a rank more than there are rows."""
    results = run_ranks(world, decode_on_ranks, rows)
    vae = small_vae()
    expected = torch.cat(list(vae.decode(latent(rows), torch.float32)))
    assert expected.shape == (4 * LATENT_FRAMES - 3, 16 * rows, 64, 3) and expected.std() > 0.1
    assert (results[0]["pictures"] - expected).abs().max() < TOLERANCE
    levels = torch.cat(list(vae.decode(latent(rows), torch.uint8)))
    difference = (results[0]["levels"].int() - levels.int()).abs()
    assert difference.max() <= 1 and difference.count_nonzero() <= levels.numel() * 1e-3, "a level at a rounding edge"
    assert {int(result["steps"]) for result in results} == {LATENT_FRAMES}, "all ranks take part in every step"


def spool_on_ranks(folder: str) -> dict[str, torch.Tensor]:
    """Rank 0 leads a decode that ends early, for a full disk, then one that does not."""
    vae, channel = small_vae(), ControlChannel()
    if torch.distributed.get_rank() > 0:
        for _ in range(2):
            decode_as_told(vae, channel.receive(), channel)
        return {}
    checkpoints = Path(folder)
    engine = VaeEngine(
        Networks(vae, load_audio_vae(checkpoints / AUDIO_VAE_FILE, CPU), load_vocoder(checkpoints / VOCODER_FILE, CPU)),
        chunk_latent_frames=1,
        fingerprint="",
        pictures=led_pictures(vae, channel),
    )
    with Path("/dev/full").open("wb") as full, pytest.raises(DiskFull):
        list(engine.spool_video(latent(4), full))
    return {"levels": torch.cat([torch.from_numpy(levels) for levels in engine.decode_video(latent(4))])}


def test_a_decode_that_fails_at_rank_0_leaves_the_ranks_in_step(tmp_path: Path) -> None:
    leader, _ = run_ranks(2, spool_on_ranks, str(write_checkpoint(tmp_path)))
    expected = torch.cat(list(small_vae().decode(latent(4), torch.uint8)))
    assert (leader["levels"].int() - expected.int()).abs().max() <= 1


def measure_on_ranks() -> dict[str, torch.Tensor]:
    machine = Machine(Ranks.from_environment(os.environ), CPU, ControlChannel(), Rates(1e-3, 1e-3))
    row = measure(small_vae(), "small", Clip(2, 4, 2, 1), machine, 1, mp4=False)
    return {name: torch.tensor(value) for name, value in asdict(row).items() if isinstance(value, int | float)}


def test_the_benchmark_measures_ranks_against_one() -> None:
    row, _ = run_ranks(2, measure_on_ranks)
    assert row["ranks"] == 2 and row["seconds"] > 0 and row["alone_s"] > 0
    assert row["efficiency"] == pytest.approx(row["alone_s"] / row["seconds"] / 2)
    assert 0 < row["relative_error"] < TOLERANCE and row["largest_level_error"] <= 1


@pytest.mark.parametrize(
    ("rows", "ranks", "expected"),
    [
        (46, 1, (46,)),
        (46, 8, (5, 5, 6, 6, 6, 6, 6, 6)),
        (60, 8, (7, 7, 7, 7, 8, 8, 8, 8)),
        (4, 3, (1, 1, 2)),
        (2, 4, (1, 1, 0, 0)),
    ],
)
def test_stripes_differ_by_one_row_at_most(rows: int, ranks: int, expected: tuple[int, ...]) -> None:
    assert stripe_heights(rows, ranks) == expected
