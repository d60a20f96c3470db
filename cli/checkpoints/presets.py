"""What a preset's folder holds: every released file, at the preset's widths."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from services.fusion.checkpoint import CONFIG_KEY
from services.fusion.checkpoint import layout as fusion_layout
from services.fusion.model.config import RELEASED as RELEASED_FUSION
from services.fusion.model.config import FusionConfig
from services.text_encoder.checkpoint import layout as text_encoder_layout
from services.text_encoder.config import RELEASED as RELEASED_TEXT_ENCODER
from services.text_encoder.config import TextEncoderConfig
from services.vae.checkpoint import (
    RELEASED_AUDIO_VAE,
    RELEASED_VIDEO_VAE,
    RELEASED_VOCODER,
    AudioVaeConfig,
    VideoVaeConfig,
    VocoderConfig,
    audio_vae_layout,
    video_vae_layout,
    vocoder_layout,
)
from shared.checkpoints import Layout
from shared.variants import AUDIO_VAE_FILE, TEXT_ENCODER_FILE, VARIANTS, VIDEO_VAE_FILE, VOCODER_FILE, Variant


@dataclass(frozen=True)
class Preset:
    """Widths of the five networks."""

    text_encoder: TextEncoderConfig
    fusion: FusionConfig
    video_vae: VideoVaeConfig
    audio_vae: AudioVaeConfig
    vocoder: VocoderConfig
    video_area: int | None
    """Pixels of a frame, written into the fusion files; None leaves the released areas."""
    pool_values: int
    """Random values drawn for the weights; odd."""


PRESETS = {
    "tiny": Preset(
        text_encoder=TextEncoderConfig(
            vocab_size=1024, dim=64, dim_attn=64, dim_ffn=160, num_heads=4, num_layers=2, num_buckets=32
        ),
        fusion=FusionConfig(dim=144, ffn_dim=48, freq_dim=64, text_dim=64, num_heads=24, num_layers=12, text_len=512),
        video_vae=replace(RELEASED_VIDEO_VAE, base_dim=8, decoder_base_dim=8),
        audio_vae=replace(RELEASED_AUDIO_VAE, hidden_dim=16),
        vocoder=replace(RELEASED_VOCODER, initial_channels=64),
        video_area=96 * 96,
        pool_values=(1 << 21) - 1,
    ),
    "full": Preset(
        text_encoder=RELEASED_TEXT_ENCODER,
        fusion=RELEASED_FUSION,
        video_vae=RELEASED_VIDEO_VAE,
        audio_vae=RELEASED_AUDIO_VAE,
        vocoder=RELEASED_VOCODER,
        video_area=None,
        pool_values=(1 << 26) - 1,
    ),
}


def to_fp8(layout: Layout) -> Layout:
    """The layout of the e4m3 file: the matrices inside blocks in float8_e4m3fn, the rest unchanged."""

    def dtype_of(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.dtype:
        return torch.float8_e4m3fn if ".blocks." in key and len(shape) == 2 else dtype

    return {key: (dtype_of(key, dtype, shape), shape) for key, (dtype, shape) in layout.items()}


def fusion_file_layout(variant: Variant, config: FusionConfig) -> Layout:
    """The layout of a variant's file at these widths."""
    layout = fusion_layout(config)
    return to_fp8(layout) if is_fp8(variant) else layout


def is_fp8(variant: Variant) -> bool:
    """True for the file with e4m3 weights."""
    return variant.id.endswith("_fp8")


def fusion_metadata(preset: Preset) -> dict[str, str]:
    """What shapes do not tell; empty at the released values, as in a released file."""
    released = RELEASED_FUSION
    if preset.video_area is None and preset.fusion == released:
        return {}
    extra: dict[str, int] = {"num_heads": preset.fusion.num_heads, "text_len": preset.fusion.text_len}
    if preset.video_area is not None:
        extra["video_area"] = preset.video_area
    return {CONFIG_KEY: json.dumps(extra, sort_keys=True)}


def stage_file_layouts(preset: Preset) -> dict[str, Layout]:
    """File -> layout of all but the fusion files."""
    return {
        TEXT_ENCODER_FILE: text_encoder_layout(preset.text_encoder),
        VIDEO_VAE_FILE: video_vae_layout(preset.video_vae),
        AUDIO_VAE_FILE: audio_vae_layout(preset.audio_vae),
        VOCODER_FILE: vocoder_layout(preset.vocoder),
    }


def released_layouts() -> dict[str, Layout]:
    """File -> layout of the release, from the packaged list; the three bfloat16 fusion files are alike.

    The e4m3 file is not listed: which of its tensors are e4m3 is not prescribed.
    """
    text = resources.files("shared").joinpath("checkpoint_layout.json").read_text()
    entries: dict[str, dict[str, list[Any]]] = json.loads(text)
    listed = {
        file: {key: (getattr(torch, entry[0]), tuple(entry[1:])) for key, entry in tensors.items()}
        for file, tensors in entries.items()
    }
    fusion = listed[VARIANTS["960x960_10s"].file]
    return listed | {variant.file: fusion for variant in VARIANTS.values() if not is_fp8(variant)}
