"""What a request may hold; pure functions that find every violation."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from services.vae.mp4 import RESERVED_KEYS
from shared.errors import FieldViolation
from shared.shapes import AUDIO_LATENT_CHANNELS, SIZE_MULTIPLE, VIDEO_LATENT_CHANNELS
from shared.tensors.framing import TensorSpec

MAX_LATENT_FRAMES = 128
MAX_LATENT_SIDE = 256
MAX_AUDIO_LENGTH = 4096
MAX_PROVENANCE_ENTRIES = 32
MAX_PROVENANCE_VALUE = 8192
MAX_SIDE = 4096
"""Pixels; 16 times MAX_LATENT_SIDE."""
MAX_VIDEO_LATENT_BYTES = VIDEO_LATENT_CHANNELS * MAX_LATENT_FRAMES * MAX_LATENT_SIDE**2 * 4
MAX_AUDIO_LATENT_BYTES = MAX_AUDIO_LENGTH * AUDIO_LATENT_CHANNELS * 4
_PROVENANCE_KEY = re.compile(r"[a-z0-9_]{1,64}")
_LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_size(height: int, width: int, *, field: str) -> list[FieldViolation]:
    """The size of a frame to encode."""
    return [
        FieldViolation(f"{field}.{name}", f"got {side}, allowed is a multiple of {SIZE_MULTIPLE} up to {MAX_SIDE}")
        for name, side in (("height", height), ("width", width))
        if not SIZE_MULTIPLE <= side <= MAX_SIDE or side % SIZE_MULTIPLE
    ]


def check_video_latent(spec: TensorSpec, *, field: str) -> list[FieldViolation]:
    """Element type and shape of a video latent: (48, F, h, w), F 1 to 128, h and w even and 2 to 256."""
    shape = spec.shape
    fits = (
        len(shape) == 4
        and shape[0] == VIDEO_LATENT_CHANNELS
        and 1 <= shape[1] <= MAX_LATENT_FRAMES
        and all(2 <= side <= MAX_LATENT_SIDE and side % 2 == 0 for side in shape[2:])
    )
    allowed = (
        f"({VIDEO_LATENT_CHANNELS}, frames, height, width) with 1 to {MAX_LATENT_FRAMES} frames and even sides of 2 to"
        f" {MAX_LATENT_SIDE}"
    )
    return _check_dtype(spec, field) + _check_shape(fits, spec, field, allowed)


def check_audio_latent(spec: TensorSpec, *, field: str) -> list[FieldViolation]:
    """Element type and shape of an audio latent: (S, 20), S 1 to 4096."""
    shape = spec.shape
    fits = len(shape) == 2 and 1 <= shape[0] <= MAX_AUDIO_LENGTH and shape[1] == AUDIO_LATENT_CHANNELS
    allowed = f"(length, {AUDIO_LATENT_CHANNELS}) with a length of 1 to {MAX_AUDIO_LENGTH}"
    return _check_dtype(spec, field) + _check_shape(fits, spec, field, allowed)


def check_provenance(provenance: Mapping[str, str]) -> list[FieldViolation]:
    """At most 32 entries; keys of [a-z0-9_], 1 to 64 of them, none of the container's own; values up to 8192."""
    violations = []
    if len(provenance) > MAX_PROVENANCE_ENTRIES:
        what = f"got {len(provenance)} entries, allowed are {MAX_PROVENANCE_ENTRIES}"
        violations.append(FieldViolation("provenance", what))
    for key, value in sorted(provenance.items()):
        field = f"provenance[{key[:64]}]"
        if not _PROVENANCE_KEY.fullmatch(key):
            violations.append(FieldViolation(field, "key must be 1 to 64 characters of [a-z0-9_]"))
        elif key in RESERVED_KEYS:
            violations.append(FieldViolation(field, "key is written by the container itself; use another"))
        if len(value) > MAX_PROVENANCE_VALUE:
            what = f"got {len(value)} characters, allowed are {MAX_PROVENANCE_VALUE}"
            violations.append(FieldViolation(field, what))
        if "\0" in value:
            violations.append(FieldViolation(field, "must not hold a NUL character"))
    return violations


def check_finite(latent: torch.Tensor, *, field: str) -> list[FieldViolation]:
    """No NaN and no infinity."""
    if bool(latent.isfinite().all()):
        return []
    return [FieldViolation(field, "holds NaN or infinity, allowed are finite values; the stage that made it failed")]


def _check_dtype(spec: TensorSpec, field: str) -> list[FieldViolation]:
    if spec.dtype in _LATENT_DTYPES:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _LATENT_DTYPES)
    what = f"got {str(spec.dtype).removeprefix('torch.')}, allowed is {names}"
    return [FieldViolation(f"{field}.spec.data_type", what)]


def _check_shape(fits: bool, spec: TensorSpec, field: str, allowed: str) -> list[FieldViolation]:
    return [] if fits else [FieldViolation(f"{field}.spec.shape", f"got {list(spec.shape)}, allowed is {allowed}")]
