"""A sampling run as the engine sees it, and the one pure check of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.fusion.checkpoint import FusionFile
from shared.errors import FieldViolation
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, check_sampling_options
from shared.shapes import AudioLatentShape, VideoLatentShape, common_sizes, legal_size
from shared.variants import Variant


@dataclass(frozen=True)
class ServedVariant:
    """A variant whose file is there and fits."""

    variant: Variant
    file: FusionFile
    fingerprint: str
    """Of the file."""

    @property
    def video_area(self) -> int:
        """Pixels of a frame before rounding."""
        return self.file.video_area or self.variant.video_area

    @property
    def audio_shape(self) -> AudioLatentShape:
        """Shape of the audio latent."""
        return self.variant.audio_shape

    def video_shape(self, height: int, width: int) -> VideoLatentShape:
        """Shape of the video latent of a legal size."""
        return VideoLatentShape.from_pixels(self.variant.num_frames, height, width)


@dataclass(frozen=True)
class TensorShape:
    """What is known of an input tensor before it is fetched."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RunSpec:
    """A sampling run without its tensors."""

    model: str
    height: int
    width: int
    options: SamplingOptions
    vram_mode: VramMode = VramMode.AUTO
    """AUTO: the engine's present mode."""


@dataclass(frozen=True)
class RunInputs:
    """The tensors of a run, on the CPU: prompt rows (L, text_dim) and a picture latent (C, 1, H, W)."""

    prompt_LC: torch.Tensor
    video_negative_LC: torch.Tensor | None
    audio_negative_LC: torch.Tensor | None
    first_frame_C1HW: torch.Tensor | None


def check_run(spec: RunSpec, tensors: dict[str, TensorShape], served: ServedVariant) -> list[FieldViolation]:
    """Every violation of a run on a variant; empty if it can be made.

    Args:
        spec: the run.
        tensors: what is known of the given references, by field name.
        served: the variant of spec.model.
    """
    config = served.file.config
    violations = check_sampling_options(spec.options, num_layers=config.num_layers, prefix="options.")
    size = (spec.height, spec.width)
    size_ok = min(size) >= 1 and legal_size(*size, served.video_area) == size
    if not size_ok:
        legal = ", ".join(f"{h}x{w}" for h, w in common_sizes(served.video_area))
        what = (
            f"got {spec.height}x{spec.width} (height x width), allowed are sizes of this model's area such as {legal}"
        )
        violations.append(FieldViolation("height", what))
    needed = {"prompt"}
    if spec.options.needs_negative_pass:
        needed |= {"video_negative", "audio_negative"}
    for field in sorted(needed - tensors.keys()):
        violations.append(FieldViolation(field, "is missing; a reference to (L, text width) rows is needed"))
    for field, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            violations.append(FieldViolation(field, f"got {tensor.dtype}, allowed are floating-point types"))
        if field == "first_frame_latent":
            if size_ok:
                shape = served.video_shape(*size)
                expected = (shape.channels, 1, shape.height, shape.width)
                if tensor.shape != expected:
                    what = f"got shape {list(tensor.shape)}, must be {list(expected)}"
                    violations.append(FieldViolation(field, what))
        elif (
            len(tensor.shape) != 2 or not 1 <= tensor.shape[0] <= config.text_len or tensor.shape[1] != config.text_dim
        ):
            what = f"got shape {list(tensor.shape)}, must be [1 to {config.text_len}, {config.text_dim}]"
            violations.append(FieldViolation(field, what))
    return violations


def check_finite(inputs: RunInputs) -> list[FieldViolation]:
    """Inputs with NaN or infinite values, which would make a clip of nothing."""
    named = {
        "prompt": inputs.prompt_LC,
        "video_negative": inputs.video_negative_LC,
        "audio_negative": inputs.audio_negative_LC,
        "first_frame_latent": inputs.first_frame_C1HW,
    }
    what = "has NaN or infinite values; only finite ones are allowed"
    return [
        FieldViolation(field, what)
        for field, tensor in named.items()
        if tensor is not None and not bool(torch.isfinite(tensor).all())
    ]
