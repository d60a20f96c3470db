"""Initial values of synthetic weights: seeded, scaled so that activations stay finite and outputs are not saturated."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch

from shared.variants import AUDIO_VAE_FILE, TEXT_ENCODER_FILE, VIDEO_VAE_FILE, VOCODER_FILE

_KEPT_POOLS = 6
_LARGE_PARTS = 16
"""A tensor of at least this part of the pool is large."""


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of a tensor's elements."""

    mean: float
    std: float


class ValuePool:
    """Normal values drawn once and used again at a different offset for every tensor.

    Drawing 12 billion independent values would take longer than writing them. A slice of a pool has the same
    distribution; equal stretches in different tensors do not matter to networks that were never trained. The pool's
    size is odd, so that the rows of a tensor longer than the pool differ.
    """

    def __init__(self, seed: int, num_values: int) -> None:
        """
        Args:
            seed: 0 to 2^63-1.
            num_values: size of the pool; odd.
        """
        self._values = torch.randn(num_values, generator=torch.Generator().manual_seed(seed))
        self._whole = functools.lru_cache(maxsize=_KEPT_POOLS)(self._finished)

    def draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, distribution: Normal) -> torch.Tensor:
        """A contiguous tensor that depends on the seed and `name` alone; may be a view of memory that others share.

        Large tensors are slices of pools that are scaled and rounded once for each dtype and distribution, since
        scaling is what takes the time.
        """
        count, size = math.prod(shape), len(self._values)
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % size
        large = count * _LARGE_PARTS >= size
        pieces = []
        while count:
            length = min(count, size - start)
            if large:
                pieces.append(self._whole(dtype, distribution, 0, size)[start : start + length])
            else:
                pieces.append(self._finished(dtype, distribution, start, length))
            count -= length
            start = (start + length) % size
        flat = pieces[0] if len(pieces) == 1 else _joined(pieces)
        return flat.view(shape)

    def _finished(self, dtype: torch.dtype, distribution: Normal, start: int, length: int) -> torch.Tensor:
        return (self._values[start : start + length] * distribution.std + distribution.mean).to(dtype)


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    out = torch.empty(sum(map(len, pieces)), dtype=pieces[0].dtype)
    done = 0
    for piece in pieces:
        out[done : done + len(piece)] = piece
        done += len(piece)
    return out


def distribution_of(file: str, key: str, shape: tuple[int, ...]) -> Normal:
    """How the elements of a released file's tensor are drawn."""
    if file == TEXT_ENCODER_FILE:
        return _text_encoder(key, shape)
    if file == VIDEO_VAE_FILE:
        return _video_vae(key, shape)
    if file == AUDIO_VAE_FILE:
        return _audio_vae(key)
    if file == VOCODER_FILE:
        return _vocoder(key, shape)
    return _fusion(key, shape)


def _fan_in(shape: tuple[int, ...], gain: float = 1.0) -> Normal:
    return Normal(0.0, gain / math.sqrt(math.prod(shape[1:])))


def _fusion(key: str, shape: tuple[int, ...]) -> Normal:
    if key.endswith("modulation"):
        return Normal(0.0, 0.2)
    if len(shape) == 1:
        return Normal(1.0, 0.05) if key.endswith("weight") else Normal(0.0, 0.02)
    return _fan_in(shape, 0.7 if key.endswith("head.head.weight") else 1.0)


def _text_encoder(key: str, shape: tuple[int, ...]) -> Normal:
    if len(shape) == 1:
        return Normal(1.0, 0.05)
    if key == "token_embedding.weight":
        return Normal(0.0, 1.0)
    if "pos_embedding" in key:
        return Normal(0.0, 0.5)
    if key.endswith("attn.q.weight"):
        return _fan_in(shape, 0.25)  # scores are not divided by the root of the head width
    return _fan_in(shape)


def _video_vae(key: str, shape: tuple[int, ...]) -> Normal:
    if key.endswith("gamma"):
        return Normal(1.0, 0.0)
    if len(shape) == 1:
        return Normal(0.0, 0.02)
    return _fan_in(shape, 0.6 if key.startswith("decoder.head") else 1.0)


def _audio_vae(key: str) -> Normal:
    if key.endswith("learnable_gain"):
        return Normal(0.0, 0.0)
    if key == "data_mean":
        return Normal(-2.0, 0.1)  # log10 of a mel bin's magnitude: soft noise
    if key == "data_std":
        return Normal(0.6, 0.01)
    return Normal(0.0, 1.0)  # every output row is normalised when loaded


def _vocoder(key: str, shape: tuple[int, ...]) -> Normal:
    if key.endswith(("bias", "alpha", "beta")):
        return Normal(0.0, 0.0)
    if key.endswith(("original0", "weight_g")):
        return Normal(0.006 if "conv_post" in key else 1.0, 0.0)  # norm of a row of weights
    return Normal(0.0, 1.0)  # direction of a row of weights
