"""Small fusion weight files for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.fusion.checkpoint import CONFIG_KEY, layout
from services.fusion.model.config import FusionConfig
from shared.variants import VARIANTS

SMALL = FusionConfig(dim=48, ffn_dim=64, freq_dim=32, text_dim=24, num_heads=4, num_layers=3, text_len=16)
VIDEO_AREA = 64 * 64


def random_weights(config: FusionConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded bfloat16 weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, (dtype, shape) in layout(config).items():
        fan_in = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 1
        scale = 0.02 if key.endswith(("bias", "modulation")) else fan_in**-0.5
        weight = torch.randn(shape, generator=generator) * scale
        weights[key] = (weight + 1 if "norm" in key and key.endswith("weight") else weight).to(dtype)
    return weights


def write_variant(folder: Path, variant: str, *, config: FusionConfig = SMALL, seed: int = 0) -> Path:
    """Write one variant's file below `folder`; returns its path."""
    path = folder / VARIANTS[variant].file
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"num_heads": config.num_heads, "text_len": config.text_len, "video_area": VIDEO_AREA}
    save_file(random_weights(config, seed), path, metadata={CONFIG_KEY: json.dumps(extra)})
    return path
