"""A small, real checkpoint of the VAE service in the released layout, for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import BinaryIO

import av
import torch

from services.vae.checkpoint import (
    RELEASED_AUDIO_VAE,
    RELEASED_VIDEO_VAE,
    RELEASED_VOCODER,
    anti_alias_filter,
    audio_vae_layout,
    video_vae_layout,
    vocoder_layout,
)
from shared.checkpoints import Layout
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE

SMALL_VIDEO_VAE = dataclasses.replace(RELEASED_VIDEO_VAE, base_dim=8, decoder_base_dim=8)
SMALL_AUDIO_VAE = dataclasses.replace(RELEASED_AUDIO_VAE, hidden_dim=8)
SMALL_VOCODER = dataclasses.replace(RELEASED_VOCODER, initial_channels=64)
_LAYOUT_FILE = Path(__file__).parent.parent / "shared" / "checkpoint_layout.json"


def released_layout(file: str) -> Layout:
    """The layout of a released file, from the list in shared/."""
    entries = json.loads(_LAYOUT_FILE.read_text())[file]
    return {key: (getattr(torch, dtype), tuple(shape)) for key, (dtype, *shape) in entries.items()}


def random_weights(layout: Layout, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that keep activations near unit size: matrices scaled by their fan-in, gains near one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, (dtype, shape) in layout.items():
        value = torch.randn(shape, generator=generator)
        if key.endswith(("gamma", "original0", "data_std")):
            value = 1.0 + 0.1 * value
        elif key.endswith(".filter"):
            value = anti_alias_filter()
        elif value.dim() >= 3 and not key.endswith("data_mean"):
            value = value * value[0].numel() ** -0.5
        else:
            value = 0.1 * value
        weights[key] = value.to(dtype)
    return weights


def write_checkpoint(folder: Path) -> Path:
    """The three files under `folder`, as released; the vocoder's nested as in the original."""
    vocoder = random_weights(vocoder_layout(SMALL_VOCODER), seed=3)
    contents = {
        VIDEO_VAE_FILE: random_weights(video_vae_layout(SMALL_VIDEO_VAE), seed=1),
        AUDIO_VAE_FILE: random_weights(audio_vae_layout(SMALL_AUDIO_VAE), seed=2),
        VOCODER_FILE: {"generator": {key.removeprefix("generator."): value for key, value in vocoder.items()}},
    }
    for file, content in contents.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    return folder


def clip_content(file: Path | BinaryIO) -> tuple[int, bytes]:
    """Number of pictures and the samples of a clip. The encoder's threads may make other bytes of the same pictures."""
    with av.open(file) as clip:
        num_frames = sum(1 for _ in clip.decode(video=0))
    if not isinstance(file, Path):
        file.seek(0)
    with av.open(file) as clip:
        return num_frames, b"".join(frame.to_ndarray().tobytes() for frame in clip.decode(audio=0))
