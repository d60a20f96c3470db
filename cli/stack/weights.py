"""What a checkpoint folder holds, as far as memory depends on it, read without PyTorch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from shared.memory.sizes import RELEASED, ClipShape, FusionSizes, StackSizes
from shared.variants import TEXT_ENCODER_FILE, VARIANTS, VIDEO_VAE_FILE, Variant

_MAX_HEADER_BYTES = 64 << 20
_CONFIG_KEY = "ovi_config"
"""Of a file's metadata, with what shapes do not tell; see services.fusion.checkpoint."""


def sizes_of(folder: Path, itemsize: int = 2) -> StackSizes:
    """Of the networks of a folder: the fusion model by its shapes, the others by the bytes of their files.

    What is missing or damaged counts as released; the services say what is wrong with it.

    Args:
        folder: in the released layout.
        itemsize: bytes of a value in the arithmetic's precision.
    """
    headers = [header for variant in VARIANTS.values() if (header := _header(folder / variant.file))]
    text_part = _part(folder / TEXT_ENCODER_FILE, RELEASED.text_encoder.total_bytes)
    vae_part = _part(folder / VIDEO_VAE_FILE, RELEASED.vae.file_bytes)
    return StackSizes(
        max((_fusion_sizes(header, itemsize) for header in headers), key=_weight, default=RELEASED.fusion),
        RELEASED.vae.scaled(vae_part),
        RELEASED.text_encoder.scaled(text_part),
    )


def clips_of(folder: Path) -> list[ClipShape]:
    """The largest usual clip of every variant in a folder, smallest first; of every released one if there is none."""
    found: list[tuple[Variant, int | None]] = []
    for variant in VARIANTS.values():
        header = _header(folder / variant.file)
        if header is not None:
            found.append((variant, _config(header).get("video_area")))
    clips = [ClipShape.largest_of(variant, area) for variant, area in found or [(v, None) for v in VARIANTS.values()]]
    return sorted(clips, key=lambda clip: clip.tokens.video)


def _weight(sizes: FusionSizes) -> int:
    return sizes.num_layers * sizes.wide_params_per_block


def _part(path: Path, released_bytes: int) -> float:
    """Bytes of a file as a part of the released one's; 1 for about the same, or if it is not there."""
    if not path.is_file():
        return 1.0
    part = path.stat().st_size / released_bytes
    return 1.0 if 0.9 < part < 1.1 else part


def _header(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file of a fusion model; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        _fusion_sizes(header, 2)
    except (OSError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    assert isinstance(header, dict)
    return header


def _config(header: dict[str, Any]) -> dict[str, int]:
    return {key: int(value) for key, value in json.loads(header.get("__metadata__", {}).get(_CONFIG_KEY, "{}")).items()}


def _fusion_sizes(header: Any, itemsize: int) -> FusionSizes:
    def shape(key: str) -> list[int]:
        return [int(size) for size in header[key]["shape"]]

    config = _config(header)
    blocks = {key.split(".")[2] for key in header if key.startswith("video_model.blocks.")}
    return FusionSizes.of_widths(
        dim=shape("video_model.patch_embedding.weight")[0],
        ffn_dim=shape("video_model.blocks.0.ffn.0.weight")[0],
        freq_dim=shape("video_model.time_embedding.0.weight")[1],
        text_dim=shape("video_model.text_embedding.0.weight")[1],
        num_heads=config.get("num_heads", RELEASED.fusion.num_heads),
        num_layers=len(blocks),
        text_len=config.get("text_len", RELEASED.fusion.text_len),
        video_channels=shape("video_model.patch_embedding.weight")[1],
        audio_channels=shape("audio_model.patch_embedding.0.weight")[1],
        itemsize=itemsize,
    )
