"""Fusion weight files: what they must hold, and how they get onto the device.

Parameter names of the model are the file's keys, so there is no key map.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from services.fusion.model.config import RELEASED, FusionConfig
from services.fusion.model.fusion import FusionModel
from shared.checkpoints import Layout, SafetensorsHeader, assign_weights, file_fingerprint, require_layout
from shared.errors import CheckpointError

CONFIG_KEY = "ovi_config"
"""Metadata key of a JSON object with what shapes do not tell (num_heads, text_len, video_area); none if released."""


@dataclass(frozen=True)
class FusionFile:
    """A checked weight file, its values not yet read."""

    header: SafetensorsHeader
    config: FusionConfig
    video_area: int | None
    """Pixels of a frame if the file says so itself."""

    @classmethod
    def open(cls, path: Path) -> FusionFile:
        """Read the header, infer the widths and check every key and shape.

        Raises:
            CheckpointError: missing, truncated, or not this model.
        """
        header = SafetensorsHeader.read(path)
        extra = _extra(header)
        config = infer_config(header.layout, path, num_heads=extra["num_heads"], text_len=extra["text_len"])
        require_layout(path, header.layout, layout(config))
        return cls(header, config, extra.get("video_area"))

    def load(self, device: torch.device, dtype: torch.dtype) -> FusionModel:
        """The model on `device` in `dtype`; tensors go from the file's memory map to the device one by one.

        Raises:
            CheckpointError: the values cannot be read.
        """
        weights = {key: tensor.to(dtype) for key, tensor in self.header.tensors(device)}
        return build(self.config, weights)

    @property
    def precision(self) -> str:
        """How the wide layers are stored."""
        dtype, _ = self.header.layout["video_model.blocks.0.ffn.0.weight"]
        return str(dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Of the file; see shared.checkpoints.file_fingerprint."""
        return file_fingerprint(self.header.path)


def build(config: FusionConfig, weights: dict[str, torch.Tensor]) -> FusionModel:
    """The model with these weights in place, wherever they are."""
    with torch.device("meta"):
        model = FusionModel(config)
    assign_weights(model, weights)
    return model


def layout(config: FusionConfig) -> Layout:
    """Every key of a bfloat16 file of these widths."""
    return {key: (torch.bfloat16, shape) for key, shape in _shapes(config).items()}


@lru_cache(maxsize=8)
def _shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    # A model is made to be asked, which takes a part of a second; the files of a folder are alike.
    with torch.device("meta"):
        model = FusionModel(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def infer_config(found: Layout, path: Path, *, num_heads: int, text_len: int) -> FusionConfig:
    """The widths a file's shapes tell.

    Raises:
        CheckpointError: a tensor that tells a width is missing, or the widths contradict each other.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in found:
            raise CheckpointError(f"{path}: no tensor {key}; this is not an Ovi fusion checkpoint")
        return found[key][1]

    blocks = {key.split(".")[2] for key in found if key.startswith("video_model.blocks.")}
    try:
        return FusionConfig(
            dim=shape("video_model.patch_embedding.weight")[0],
            ffn_dim=shape("video_model.blocks.0.ffn.0.weight")[0],
            freq_dim=shape("video_model.time_embedding.0.weight")[1],
            text_dim=shape("video_model.text_embedding.0.weight")[1],
            num_heads=num_heads,
            num_layers=len(blocks),
            text_len=text_len,
            video_channels=shape("video_model.patch_embedding.weight")[1],
            audio_channels=shape("audio_model.patch_embedding.0.weight")[1],
        )
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: its shapes do not make a model: {error}") from None


def _extra(header: SafetensorsHeader) -> dict[str, int]:
    extra = {"num_heads": RELEASED.num_heads, "text_len": RELEASED.text_len}
    text = header.metadata.get(CONFIG_KEY)
    if text is None:
        return extra
    try:
        given = json.loads(text)
        unknown = given.keys() - {"num_heads", "text_len", "video_area"}
        values = {str(key): int(value) for key, value in given.items()}
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{header.path}: metadata {CONFIG_KEY} is no JSON object of numbers: {text[:200]}"
        ) from None
    if unknown or min(values.values(), default=1) < 1:
        raise CheckpointError(f"{header.path}: metadata {CONFIG_KEY} has unknown keys or values below 1: {text[:200]}")
    return extra | values
