"""Pictures decoded in tiles, one tile's whole clip after the other.

A tile is decoded together with all that its pictures depend on, as far as the networks see: nothing has to be blended,
and there are no seams. The price is that this margin is decoded more than once, and the first level for every tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.vae.model.video_layers import PIXEL_CHANNELS, Window
from shared.shapes import VideoLatentShape


@dataclass(frozen=True)
class Tile:
    """A part of a picture, in latent pixels."""

    own: Window
    """What it makes."""
    seen: Window
    """What is decoded for that."""


def cut_tiles(height: int, width: int, side: int, reach: int) -> list[Tile]:
    """Tiles that make up a picture, row by row, their sides equal up to one.

    Args:
        height: of the picture, in latent pixels like the rest.
        width: of the picture.
        side: of the largest tile.
        reach: how far a tile's pictures depend on what is around it.
    """
    return [
        Tile(
            Window(top, left, bottom - top, right - left),
            Window(
                seen_top := max(0, top - reach),
                seen_left := max(0, left - reach),
                min(height, bottom + reach) - seen_top,
                min(width, right + reach) - seen_left,
            ),
        )
        for top, bottom in _cut(height, side)
        for left, right in _cut(width, side)
    ]


def decode_tiled(
    decode: Callable[[Window], Iterator[torch.Tensor]],
    tiles: Sequence[Tile],
    shape: VideoLatentShape,
    report: Callable[[float], object],
) -> Iterator[torch.Tensor]:
    """Levels (f, 16H, 16W, 3) of whole pictures in host memory, step by step; empty for all steps before the last tile.

    Args:
        decode: levels of a window of the pictures in host memory, step by step.
        tiles: of a picture.
        shape: of the latent.
        report: told the part of the work that is done, 0 to 1, before each step is given.
    """
    pictures_FHWC = torch.empty(
        shape.num_frames, shape.pixel_height, shape.pixel_width, PIXEL_CHANNELS, dtype=torch.uint8
    )
    for index, tile in enumerate(tiles):
        num_done = 0
        for seen_FHWC in decode(tile.seen):
            step_FHWC = pictures_FHWC[num_done : num_done + len(seen_FHWC)]
            num_done += len(seen_FHWC)
            _part(step_FHWC, tile.own, Window(0, 0, shape.height, shape.width)).copy_(
                _part(seen_FHWC, tile.own, tile.seen)
            )
            report((index + num_done / shape.num_frames) / len(tiles))
            yield step_FHWC if tile is tiles[-1] else step_FHWC[:0]


def _cut(length: int, side: int) -> list[tuple[int, int]]:
    """(start, stop) of the fewest equal parts that are no longer than `side`."""
    count = -(-length // side)
    return [(index * length // count, (index + 1) * length // count) for index in range(count)]


def _part(levels_FHWC: torch.Tensor, wanted: Window, given: Window) -> torch.Tensor:
    """The wanted part of the levels of a given window."""
    scale = levels_FHWC.shape[1] // given.height
    top, left = (wanted.top - given.top) * scale, (wanted.left - given.left) * scale
    return levels_FHWC[:, top : top + wanted.height * scale, left : left + wanted.width * scale]
