"""Pixel, frame and latent arithmetic; the only home of (F-1)//4+1, //16 and the rounding of sizes.

Source: Ovi (arXiv 2510.01284) section 3; Wan2.2 VAE (16x16x4), MMAudio VAE (512 samples a latent at 16 kHz).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FPS = 24
SAMPLE_RATE_HZ = 16_000
SIZE_MULTIPLE = 32
"""Sides of a frame are multiples of this: VAE stride 16 times patch 2."""
VIDEO_LATENT_CHANNELS = 48
AUDIO_LATENT_CHANNELS = 20
AUDIO_SAMPLES_PER_LATENT = 512
_SPATIAL_STRIDE = 16
_TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class VideoLatentShape:
    """Shape (channels, frames, height, width) of a video latent."""

    frames: int
    height: int
    width: int
    channels: int = VIDEO_LATENT_CHANNELS

    @classmethod
    def from_pixels(cls, num_frames: int, height: int, width: int) -> VideoLatentShape:
        """The latent of `num_frames` frames of height x width pixels.

        Raises:
            ValueError: num_frames is not 1 more than a multiple of 4, or a side no positive multiple of 32.
        """
        if num_frames < 1 or (num_frames - 1) % _TEMPORAL_STRIDE:
            raise ValueError(f"num_frames must be 1 more than a multiple of 4, got {num_frames}")
        if height < SIZE_MULTIPLE or width < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise ValueError(f"height and width must be positive multiples of {SIZE_MULTIPLE}, got {height}x{width}")
        frames = (num_frames - 1) // _TEMPORAL_STRIDE + 1
        return cls(frames, height // _SPATIAL_STRIDE, width // _SPATIAL_STRIDE)

    @property
    def num_frames(self) -> int:
        """Frames of the decoded video."""
        return (self.frames - 1) * _TEMPORAL_STRIDE + 1

    @property
    def pixel_height(self) -> int:
        """Height of a decoded frame."""
        return self.height * _SPATIAL_STRIDE

    @property
    def pixel_width(self) -> int:
        """Width of a decoded frame."""
        return self.width * _SPATIAL_STRIDE

    def as_tuple(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width)."""
        return (self.channels, self.frames, self.height, self.width)


@dataclass(frozen=True)
class AudioLatentShape:
    """Shape (length, channels) of an audio latent."""

    length: int
    channels: int = AUDIO_LATENT_CHANNELS

    @classmethod
    def from_seconds(cls, seconds: int) -> AudioLatentShape:
        """The latent of a 5 s (157) or 10 s (314) clip: 157 rows for every 5 s.

        Raises:
            ValueError: not a multiple of 5 s.
        """
        if seconds <= 0 or seconds % 5:
            raise ValueError(f"clip length must be a multiple of 5 s, got {seconds}")
        return cls(157 * seconds // 5)

    @property
    def num_samples(self) -> int:
        """Samples of the decoded sound."""
        return self.length * AUDIO_SAMPLES_PER_LATENT

    def as_tuple(self) -> tuple[int, int]:
        """(length, channels)."""
        return (self.length, self.channels)


def snap_size(height: float, width: float, area: int) -> tuple[int, int]:
    """Scale (height, width) to `area` pixels keeping the aspect, then round each side to the nearest multiple of 32.

    Halves round to even; the smallest side is 32.
    """
    scale = math.sqrt(area / (height * width))

    def round_side(side: float) -> int:
        return max(SIZE_MULTIPLE, round(side * scale / SIZE_MULTIPLE) * SIZE_MULTIPLE)

    return round_side(height), round_side(width)


def legal_size(height: int, width: int, area: int) -> tuple[int, int] | None:
    """The size a model of `area` makes for the requested one, or None if it cannot.

    A request is legal if only rounding to the 32-pixel grid is needed: each side moves by at most 16 pixels.
    """
    snapped = snap_size(height, width, area)
    if abs(snapped[0] - height) > SIZE_MULTIPLE // 2 or abs(snapped[1] - width) > SIZE_MULTIPLE // 2:
        return None
    return snapped


_ASPECTS = ((1, 1), (9, 16), (16, 9), (3, 4), (4, 3), (2, 3), (3, 2))


def common_sizes(area: int) -> list[tuple[int, int]]:
    """Legal (height, width) of the usual aspects, square first, without repetitions."""
    return list(dict.fromkeys(snap_size(h, w, area) for h, w in _ASPECTS))
