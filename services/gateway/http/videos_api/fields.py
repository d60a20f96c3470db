"""The fields of a create: multipart or JSON, flat or `a[b]`, every value possibly a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.engine import GatewayEngine
from services.gateway.http.bodies import json_object
from services.gateway.http.reading import FieldReader
from services.gateway.http.sampling import read_priority, read_sampling, read_vram_mode, refuse_lora
from services.gateway.http.uploads import MAX_DATA_URL_CHARACTERS, image_id_of, keep_picture
from services.gateway.http.variants import choose_variant, read_size, seconds_of
from services.gateway.jobs.domain import HIGHEST_PRIORITY, LOWEST_PRIORITY
from services.gateway.models import ModelInfo
from shared.errors import InvalidRequest
from shared.memory.modes import VramMode
from shared.pictures import MAX_PICTURE_BYTES
from shared.sampling_options import MAX_FLOW_SHIFT, MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Solver

REFERENCE = "input_reference"
SAMPLING = {
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "video_guidance_scale",
    "audio_guidance_scale": "audio_guidance_scale",
    "flow_shift": "flow_shift",
    "solver": "solver",
    "slg_layer": "slg_layer",
    "seed": "seed",
}
"""This API's name to the engine's."""
CREATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {
        "prompt": {"type": "string", "minLength": 1, "maxLength": 5000},
        "model": {"type": "string", "description": "Variant; without it the first that makes this length and size."},
        "seconds": {"type": "string", "description": "Length; a variant makes one.", "examples": ["5"]},
        "size": {"type": "string", "description": "WIDTHxHEIGHT; must be one that the variant makes."},
        REFERENCE: {
            "description": "First picture: a file, or an object with image_url (a data URL) or file_id (an upload id).",
            "anyOf": [
                {"type": "string", "format": "binary"},
                {"type": "object", "properties": {"image_url": {"type": "string"}, "file_id": {"type": "string"}}},
            ],
        },
        "negative_prompt": {"type": "string", "maxLength": 5000},
        "audio_negative_prompt": {"type": "string", "maxLength": 5000},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": MAX_STEPS, "default": 50},
        "guidance_scale": {"type": "number", "minimum": 1, "maximum": MAX_GUIDANCE, "default": 4},
        "audio_guidance_scale": {"type": "number", "minimum": 1, "maximum": MAX_GUIDANCE, "default": 3},
        "flow_shift": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_FLOW_SHIFT, "default": 5},
        "solver": {"type": "string", "enum": [solver.value for solver in Solver]},
        "slg_layer": {"type": "integer", "minimum": 0, "description": "0: off.", "default": 11},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 100},
        "lora": {"type": "string"},
        "vram_mode": {"type": "string", "enum": [mode.value for mode in VramMode]},
        "priority": {"type": "integer", "minimum": LOWEST_PRIORITY, "maximum": HIGHEST_PRIORITY},
    },
}
"""For the OpenAPI document; numbers may come as texts."""
_KNOWN = set(CREATE_SCHEMA["properties"])
ENGINE_NAMES = {
    "request_id": "Idempotency-Key",
    "parameters.prompt": "prompt",
    "parameters.model": "model",
    "parameters.height": "size",
    "parameters.width": "size",
    "parameters.num_frames": "seconds",
    "parameters.image_id": REFERENCE,
    "parameters.vram_mode": "vram_mode",
    "parameters.video_negative_prompt": "negative_prompt",
    "parameters.audio_negative_prompt": "audio_negative_prompt",
    **{f"parameters.options.{theirs}": ours for ours, theirs in SAMPLING.items()},
}
"""The engine's name of a field to this API's."""
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_BRACKETED = re.compile(r"([^\[\]]{1,64})((?:\[[^\[\]]{0,64}\]){1,4})")
_MAX_FIELDS = 64
_MAX_SECONDS = 3600


async def read_fields(request: Request) -> dict[str, Any]:
    """The fields of a form or a JSON object, `a[b]` as {"a": {"b": ...}}.

    Raises:
        InvalidRequest: neither of both, or a field that is given twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _FORMS:
        return await json_object(request)
    form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=MAX_DATA_URL_CHARACTERS)
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        _put(fields, name, value)
    return fields


def read_create(
    fields: Mapping[str, Any], models: Mapping[str, ModelInfo]
) -> tuple[pb.GenerationParameters, int | None]:
    """What to make, but for the picture, and its priority (None: the usual one).

    Raises:
        InvalidRequest: with every violation, in this API's names.
    """
    reader = FieldReader(fields)
    reader.only(_KNOWN)
    wanted = pb.GenerationParameters(prompt=reader.text("prompt", required=True) or "")
    for field in ("negative_prompt", "audio_negative_prompt"):
        text = reader.text(field)
        if text is not None:
            setattr(wanted, "video_negative_prompt" if field == "negative_prompt" else field, text)
    read_sampling(reader, SAMPLING, wanted.options)
    read_vram_mode(reader, "vram_mode", wanted)
    refuse_lora(reader, "lora")
    size = read_size(reader, "size", order="WIDTHxHEIGHT")
    seconds = reader.whole("seconds", 1, _MAX_SECONDS)
    wanted.model = choose_variant(
        models,
        model_id=reader.text("model") or "",
        seconds=seconds,
        size=size[::-1] if size is not None else None,
        on_seconds=lambda what: reader.wrong("seconds", what),
        on_size=lambda what: reader.wrong("size", what),
        show_seconds=lambda number: f'"{number}"',
        show_size=lambda height, width: f"{width}x{height}",
    )
    if size is not None:
        wanted.width, wanted.height = size
    if seconds is not None and wanted.model in models and seconds_of(models[wanted.model]) == seconds:
        wanted.num_frames = models[wanted.model].num_frames
    priority = read_priority(reader, "priority")
    reader.check()
    return wanted, priority


async def keep_reference(engine: GatewayEngine, reference: Any) -> str:
    """The id of the picture that `input_reference` holds: a file, {"image_url": data URL} or {"file_id": upload id}.

    Raises:
        InvalidRequest: anything else, or no picture.
    """
    if isinstance(reference, UploadFile):
        if reference.size is not None and reference.size > MAX_PICTURE_BYTES:
            what = f"got {reference.size} bytes, allowed is at most {MAX_PICTURE_BYTES}"
            raise InvalidRequest.of(REFERENCE, what)
        return (await keep_picture(engine, await reference.read(), field=REFERENCE)).id
    if isinstance(reference, Mapping) and len(reference) == 1:
        ((name, value),) = reference.items()
        if name in ("image_url", "file_id") and isinstance(value, str):
            return await image_id_of(engine, value, field=f"{REFERENCE}[{name}]")
    allowed = "a file, or an object with one of image_url (a data URL) and file_id (an upload id)"
    shown = reference[:40] if isinstance(reference, str) else type(reference).__name__
    raise InvalidRequest.of(REFERENCE, f"got {shown!r}, allowed is {allowed}")


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    path = [name]
    bracketed = _BRACKETED.fullmatch(name)
    if bracketed is not None:
        path = [bracketed[1], *bracketed[2][1:-1].split("][")]
    place = fields
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InvalidRequest.of(name[:80], "is given both as a value and in parts")
    if path[-1] in place:
        raise InvalidRequest.of(name[:80], "is given twice")
    place[path[-1]] = value
