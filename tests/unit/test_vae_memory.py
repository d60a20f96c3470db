"""Memory of a decode: what is estimated against what the decoder's tensors take, counted without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.vae import shapes_only
from services.vae.model.video_decoder import VideoDecoder
from services.vae.model.video_vae import RELEASED_VIDEO_VAE, wan_network
from services.vae.ops import FusedOps
from services.vae.tiles import cut_tiles
from shared.memory.choose import plan_vae
from shared.memory.estimate import TILE_REACH, VaeLayout, estimate_vae
from shared.memory.modes import VramMode
from shared.memory.sizes import RELEASED_VAE
from tests.live_bytes import LiveBytes

GIB = 2**30
META = torch.device("meta")


@pytest.fixture(scope="module")
def decoder() -> VideoDecoder:
    with META:
        network: Any = wan_network(RELEASED_VIDEO_VAE)
    return VideoDecoder(network, shapes_only(FusedOps(None)), META, torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((960, 960), VaeLayout(2, None)),
        ((960, 960), VaeLayout(1, None)),
        ((736, 704), VaeLayout(2, None)),
        ((512, 1280), VaeLayout(1, None)),
        ((960, 960), VaeLayout(1, 32)),
        ((736, 704), VaeLayout(1, 32)),
        ((960, 960), VaeLayout(1, 16)),
        ((960, 960), VaeLayout(1, 8)),
    ],
    ids=str,
)
def test_the_estimate_is_what_the_tensors_take(decoder: VideoDecoder, size: tuple[int, int], layout: VaeLayout) -> None:
    """Some steps, so that all past frames are there; of tiles the one that sees most."""
    sides = [side // 16 for side in size]
    latent_FHWC = torch.empty(7, *sides, 48, dtype=torch.bfloat16, device=META)
    window = None
    if layout.tile_latent_side is not None:
        tiles = cut_tiles(*sides, layout.tile_latent_side, decoder.reach)
        window = max((tile.seen for tile in tiles), key=lambda seen: seen.height * seen.width)
    with LiveBytes() as live:
        for _ in decoder.stream(
            latent_FHWC, torch.uint8, window=window, latent_frames_per_step=layout.latent_frames_per_step
        ):
            pass
    weights = sum(weight.nbytes for weight in decoder.tensors().values())
    parts = estimate_vae(RELEASED_VAE, *size, layout, hosted=True).by_name
    assert parts["weights"] == weights
    assert parts["activations"] == pytest.approx(live.peak, rel=0.05)


def test_a_tile_is_decoded_with_what_it_depends_on(decoder: VideoDecoder) -> None:
    assert decoder.reach == TILE_REACH


@pytest.mark.parametrize(
    ("size", "budget_gib", "frames", "tile_side"),
    [
        ((960, 960), 20, 2, None),
        ((960, 960), 15.5, 2, None),
        ((960, 960), 10, 1, None),
        ((960, 960), 6.3, 1, 32),
        ((736, 704), 10, 2, None),
        ((736, 704), 6.3, 1, None),
    ],
)
def test_small_cards_decode_whole_pictures_where_they_can(size, budget_gib, frames, tile_side) -> None:
    layout = plan_vae(RELEASED_VAE, *size, VramMode.STREAMED, int(budget_gib * GIB)).layout
    assert layout == VaeLayout(frames, tile_side)
