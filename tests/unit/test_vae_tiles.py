"""Pictures decoded in tiles are the whole ones, at the seams too."""

from __future__ import annotations

import pytest
import torch

from services.vae.checkpoint import assemble_video_vae
from services.vae.decoding import PictureDecoder
from services.vae.memory import VaeMemory
from services.vae.model.video_layers import ReferenceOps, Window
from services.vae.model.video_vae import VideoVae
from services.vae.tiles import cut_tiles
from shared.memory.estimate import TILE_REACH, VaeLayout
from shared.memory.sizes import RELEASED_VAE
from tests.unit.test_vae_decoder import TOLERANCE, random_network
from tests.vae_checkpoint import SMALL_VIDEO_VAE

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH = 2, 16, 16
SIDE = 8
"""Of a tile: two of them to each side, each of which sees less than all."""


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    return assemble_video_vae(SMALL_VIDEO_VAE, random_network(), CPU, torch.float32, ReferenceOps())


@pytest.fixture(scope="module")
def latent() -> torch.Tensor:
    return torch.randn(48, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def whole(vae: VideoVae, latent: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(vae.decode(latent, torch.float32)))


def in_tiles(vae: VideoVae, latent: torch.Tensor, reach: int) -> torch.Tensor:
    """Pictures put together of tiles that are decoded with so much around them."""
    pictures = torch.full((4 * FRAMES - 3, 16 * HEIGHT, 16 * WIDTH, 3), torch.nan)
    for tile in cut_tiles(HEIGHT, WIDTH, SIDE, reach):
        own, seen = tile.own, tile.seen
        decoded = torch.cat(list(vae.decode(latent, torch.float32, window=seen)))
        top, left = 16 * (own.top - seen.top), 16 * (own.left - seen.left)
        rows, columns = (
            slice(16 * own.top, 16 * (own.top + own.height)),
            slice(16 * own.left, 16 * (own.left + own.width)),
        )
        pictures[:, rows, columns] = decoded[:, top : top + 16 * own.height, left : left + 16 * own.width]
    return pictures


def test_there_are_no_seams(vae: VideoVae, latent: torch.Tensor, whole: torch.Tensor) -> None:
    """Nothing but rounding, which does not gather where tiles meet."""
    error = (in_tiles(vae, latent, vae.decoder.reach) - whole).abs()
    assert whole.std() > 0.1 and error.max() < TOLERANCE
    near_seams = torch.zeros(16 * HEIGHT, 16 * WIDTH, dtype=torch.bool)
    near_seams[8 * HEIGHT - 8 : 8 * HEIGHT + 8] = near_seams[:, 8 * WIDTH - 8 : 8 * WIDTH + 8] = True
    assert error[:, near_seams].mean() < 2 * error[:, ~near_seams].mean()


def test_less_around_a_tile_would_show(vae: VideoVae, latent: torch.Tensor, whole: torch.Tensor) -> None:
    """The networks do see as far as is decoded: the last pixels hardly, the first ones clearly."""
    errors = [(in_tiles(vae, latent, reach) - whole).abs().max().item() for reach in (0, 2, TILE_REACH - 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[1] > 100 * TOLERANCE and errors[2] > TOLERANCE


def test_tiles_are_put_together_as_the_last_one_comes(vae: VideoVae, latent: torch.Tensor) -> None:
    """Levels are the same but for values at a rounding edge; every step shows that there is progress."""
    decoder = PictureDecoder(vae, CPU, VaeMemory(CPU, RELEASED_VAE, None))
    whole = list(decoder.decode(latent, VaeLayout(1, None)))
    assert decoder.part_done == 0, "frames tell by themselves"
    tiled, parts = [], []
    for step in decoder.decode(latent, VaeLayout(1, SIDE)):
        tiled.append(step)
        parts.append(decoder.part_done)
    assert all(0 < part <= 1 for part in parts) and parts == sorted(set(parts)) and parts[-1] == 1
    assert [len(step) for step in tiled] == [0] * 3 * FRAMES + [len(step) for step in whole]
    difference = (torch.cat(tiled).int() - torch.cat(whole).int()).abs()
    assert difference.max() <= 1 and difference.count_nonzero() <= difference.numel() * 1e-3


@pytest.mark.parametrize(("height", "width", "side"), [(60, 60, 32), (46, 44, 16), (8, 70, 8), (2, 2, 8)])
def test_tiles_cover_the_picture_once_and_see_what_is_around_them(height: int, width: int, side: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.int64)
    for tile in cut_tiles(height, width, side, TILE_REACH):
        own, seen = tile.own, tile.seen
        assert max(own.height, own.width) <= side
        covered[own.top : own.top + own.height, own.left : own.left + own.width] += 1
        for at, length, seen_at, seen_length, end in (
            (own.top, own.height, seen.top, seen.height, height),
            (own.left, own.width, seen.left, seen.width, width),
        ):
            assert seen_at == max(0, at - TILE_REACH)
            assert seen_at + seen_length == min(end, at + length + TILE_REACH)
    assert (covered == 1).all()


def test_a_window_is_cut_out_of_frames() -> None:
    frames = torch.arange(2 * 4 * 5).view(2, 4, 5, 1)
    assert torch.equal(Window(1, 2, 2, 3).cut(frames), frames[:, 1:3, 2:5])
