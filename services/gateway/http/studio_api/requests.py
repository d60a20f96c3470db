"""Reading a GenerationJob that a client sent. Pure, but for the models that are there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.http.reading import FieldReader
from services.gateway.http.sampling import read_sampling, read_vram_mode
from services.gateway.http.variants import choose_variant, read_size, seconds_of
from services.gateway.models import ModelInfo
from shared.allocations import ALLOCATIONS
from shared.errors import FieldViolation, InvalidRequest

MAX_LABEL_CHARACTERS = 200
_SAMPLING = {
    "seed": "seed",
    "steps": "num_inference_steps",
    "videoGuidance": "video_guidance_scale",
    "audioGuidance": "audio_guidance_scale",
    "solver": "solver",
    "slgLayer": "slg_layer",
}
"""The studio's name to the engine's."""
ENGINE_NAMES = {
    "request_id": "id",
    "parameters.prompt": "prompt",
    "parameters.model": "options.resolution",
    "parameters.height": "options.resolution",
    "parameters.width": "options.resolution",
    "parameters.num_frames": "options.duration",
    "parameters.image_id": "image",
    "parameters.vram_mode": "options.vramMode",
    **{f"parameters.options.{theirs}": f"options.{ours}" for ours, theirs in _SAMPLING.items()},
}
"""The engine's name of a field to the studio's."""
_DEFAULTS = {"resolution": "960x960", "duration": "10s", "vramMode": "standard"}
"""Where they are not the engine's own."""
_DURATION = re.compile(r"([1-9][0-9]{0,3})s")
_MODES = {"t2v": "t2v", "i2v": "i2v"}


@dataclass(frozen=True)
class StudioRequest:
    """What a client asked for."""

    label: str
    created_at: str
    wanted: pb.GenerationParameters
    """All but the picture."""
    image: str
    """Data URL or upload id; empty for none."""
    resolution: str
    """As asked for."""
    allocation: str
    """How the work is to be spread over GPUs; empty: however it is."""


def read_generation_job(fields: Mapping[str, Any], models: Mapping[str, ModelInfo]) -> StudioRequest:
    """A GenerationJob; unknown keys are passed over.

    Raises:
        InvalidRequest: with every violation.
    """
    reader = FieldReader(fields)
    label = _label(reader)
    prompt = reader.text("prompt", required=True) or ""
    image = reader.text("image") or ""
    mode = reader.choice("mode", _MODES)
    if reader.raw("mode") is None:
        reader.wrong("mode", "is missing, allowed is t2v or i2v")
    if mode == "i2v" and not image:
        reader.wrong("image", "is missing, i2v needs a data URL or an upload id")
    if mode == "t2v" and image:
        reader.wrong("image", "is given, but t2v takes none; say i2v")
    created_at = _created_at(reader)
    options = reader.raw("options")
    if options is not None and not isinstance(options, Mapping):
        reader.wrong("options", f"got {str(options)[:80]!r}, allowed is an object")
        options = None
    wanted = pb.GenerationParameters(prompt=prompt)
    given = {name: value for name, value in (options or {}).items() if value is not None}
    choices = FieldReader(_DEFAULTS | given, prefix="options.")
    allocation = _read_options(choices, wanted, models)
    violations: list[FieldViolation] = reader.violations + choices.violations
    if violations:
        raise InvalidRequest(violations)
    return StudioRequest(label, created_at, wanted, image, str(choices.raw("resolution")), allocation)


def _label(reader: FieldReader) -> str:
    label = reader.text("id", required=True)
    if label is None:
        return ""
    plain = not any(unicodedata.category(character) == "Cc" for character in label)
    if not 1 <= len(label) <= MAX_LABEL_CHARACTERS or not plain:
        allowed = f"1 to {MAX_LABEL_CHARACTERS} characters without control characters"
        reader.wrong("id", f"got {label[:80]!r}, allowed is {allowed}")
    return label


def _created_at(reader: FieldReader) -> str:
    text = reader.text("createdAt", required=True)
    if text is None:
        return ""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        reader.wrong("createdAt", f"got {text[:80]!r}, allowed is a time in ISO 8601, such as 2026-01-31T12:00:00Z")
    return text


def _read_options(reader: FieldReader, wanted: pb.GenerationParameters, models: Mapping[str, ModelInfo]) -> str:
    read_sampling(reader, _SAMPLING, wanted.options)
    read_vram_mode(reader, "vramMode", wanted)
    if reader.truth("enableLora"):
        reader.wrong("enableLora", "got true, but this gateway has no LoRA; allowed is false")
    size = read_size(reader, "resolution", order="HEIGHTxWIDTH")
    text = reader.text("duration") or ""
    duration = _DURATION.fullmatch(text)
    if duration is None:
        reader.wrong("duration", f'got {text[:80]!r}, allowed is a number of seconds such as "5s" or "10s"')
    seconds = int(duration[1]) if duration is not None else None
    wanted.model = choose_variant(
        models,
        model_id="",
        seconds=seconds,
        size=size,
        on_seconds=lambda what: reader.wrong("duration", what),
        on_size=lambda what: reader.wrong("resolution", what),
        show_seconds=lambda number: f"{number}s",
        show_size=lambda height, width: f"{height}x{width}",
    )
    if size is not None:
        wanted.height, wanted.width = size
    if seconds is not None and wanted.model in models and seconds_of(models[wanted.model]) == seconds:
        wanted.num_frames = models[wanted.model].num_frames
    allocation = reader.choice("gpuAllocation", {name: name for name in ALLOCATIONS})
    return allocation if allocation not in (None, "auto") else ""
