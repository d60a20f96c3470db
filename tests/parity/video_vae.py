"""The video VAE against `video_vae.safetensors`: both ways, and decoding in chunks of every length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from services.vae.checkpoint import load_video_vae
from services.vae.model.video_vae import VideoVae
from tests.parity.comparison import Comparison, GoldenFile, max_abs_err

FILE = "video_vae"
_CPU = torch.device("cpu")


def comparisons(golden: Path) -> Iterator[Comparison]:
    """Every output of the file in a folder of golden vectors."""
    file = GoldenFile.read(golden / f"{FILE}.safetensors")
    vae = _load(file)
    tensors = file.tensors
    for case in ("video", "image"):
        ours = vae.encode(tensors[case])
        yield Comparison(FILE, f"encode_{case}", f"{case}_latent", max_abs_err(ours, tensors[f"{case}_latent"]))
    decoded = {length: _decode(vae, tensors["latent"], length) for length in (1, 2, 3)}
    for length, ours in decoded.items():
        yield Comparison(FILE, "decode", f"decoded/chunk{length}", max_abs_err(ours, tensors["decoded"]))
    for length in (2, 3):
        error = max_abs_err(decoded[length], decoded[1])
        yield Comparison(FILE, "decode", f"chunk{length}=chunk1", error, tolerance=0.0)


def _load(file: GoldenFile) -> VideoVae:
    """Through the loader of the released file, so a file in that layout is written first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Wan2.2_VAE.pth"
        torch.save(file.weights("weights."), path)
        return load_video_vae(
            path,
            _CPU,
            torch.float32,
            latent_mean=file.tensors["mean"].tolist(),
            latent_std=file.tensors["std"].tolist(),
        )


def _decode(vae: VideoVae, latent_BCFHW: torch.Tensor, chunk_latent_frames: int) -> torch.Tensor:
    pictures = vae.regroup(vae.decode(latent_BCFHW[0], vae.dtype), chunk_latent_frames)
    return torch.cat(list(pictures)).permute(3, 0, 1, 2)[None]
