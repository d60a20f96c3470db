"""Is this request one that can be made? Everything wrong with it is found at once, before anything is queued. Pure.

The request comes as protobuf: its fields know whether they were given, and what is absent takes a default here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.images import ImageInfo
from services.gateway.jobs.domain import HIGHEST_PRIORITY, LOWEST_PRIORITY, ClipParameters, Submission
from services.gateway.models import ModelInfo, runnable
from shared.errors import FieldViolation, InvalidRequest
from shared.generation_proto import sampling_options_from_proto
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, check_sampling_options
from shared.shapes import SIZE_MULTIPLE, legal_size, snap_size
from shared.system_proto import vram_mode_from_proto

MAX_PROMPT_CHARACTERS = 5000
MAX_LABEL_CHARACTERS = 200
DEFAULT_VIDEO_NEGATIVE = "jitter, bad hands, blur, distortion"
DEFAULT_AUDIO_NEGATIVE = "robotic, muffled, echo, distorted"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LAST_TIME_S = 253_402_300_799.0
"""The end of the year 9999, the last that JSON can tell."""
_ANY_LAYER = 1 << 32
"""Number of blocks taken where the model is unknown, so that no second error follows from the first."""

_NegativeField = Literal["video_negative_prompt", "audio_negative_prompt"]


def validate(
    submission: Submission,
    parameters: pb.GenerationParameters,
    models: Mapping[str, ModelInfo],
    image: ImageInfo | None,
    now_s: float,
) -> ClipParameters:
    """What is to be made, every default filled in.

    Args:
        submission: who asks, and how the job is to be treated.
        parameters: as asked.
        models: variants by id, with those that cannot be run; the first that can is the default.
        image: the kept picture that `parameters.image_id` names; None if it is not kept.
        now_s: Unix seconds.

    Raises:
        InvalidRequest: with every violation; field paths begin at the CreateJob request.
    """
    check = _Check()
    check.submission(submission, now_s)
    model = check.model(parameters, models)
    prompt = check.text("prompt", parameters.prompt, fewest=1)
    video_negative = check.optional_text(parameters, "video_negative_prompt", DEFAULT_VIDEO_NEGATIVE)
    audio_negative = check.optional_text(parameters, "audio_negative_prompt", DEFAULT_AUDIO_NEGATIVE)
    options = check.options(parameters, model)
    if parameters.image_id and image is None:
        what = f"got {parameters.image_id[:80]!r}, allowed is an id that UploadImage gave"
        check.wrong("parameters.image_id", what)
    height, width = check.size(parameters, model, image)
    num_frames = check.num_frames(parameters, model)
    vram_mode = check.vram_mode(parameters)
    if check.violations or model is None:
        raise InvalidRequest(check.violations)
    return ClipParameters(
        prompt=prompt,
        video_negative_prompt=video_negative,
        audio_negative_prompt=audio_negative,
        model=model.id,
        height=height,
        width=width,
        num_frames=num_frames,
        options=options,
        image_id=parameters.image_id,
        vram_mode=vram_mode,
    )


def control_character(text: str) -> str | None:
    """The first control character in a text, as "U+0007"; None if there is none."""
    return next((f"U+{ord(c):04X}" for c in text if unicodedata.category(c) == "Cc"), None)


def is_request_id(text: str) -> bool:
    """True if jobs can be looked up by this."""
    return _REQUEST_ID.fullmatch(text) is not None


class _Check:
    """Collects violations; every method gives a value to go on with even where it found one."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def wrong(self, field: str, description: str) -> None:
        self.violations.append(FieldViolation(field, description))

    def submission(self, submission: Submission, now_s: float) -> None:
        request_id, deadline_s = submission.request_id, submission.deadline_time_s
        if request_id and _REQUEST_ID.fullmatch(request_id) is None:
            what = f"got {request_id[:140]!r}, allowed is nothing or 1 to 128 characters of [A-Za-z0-9._-]"
            self.wrong("request_id", what)
        if not LOWEST_PRIORITY <= submission.priority <= HIGHEST_PRIORITY:
            what = f"got {submission.priority}, allowed is {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}, higher ones first"
            self.wrong("priority", what)
        if deadline_s is not None and not now_s < deadline_s <= _LAST_TIME_S:
            what = f"got {deadline_s:.0f} (Unix seconds), allowed is a time after now, which is {now_s:.0f}"
            self.wrong("deadline", what)
        if len(submission.label) > MAX_LABEL_CHARACTERS:
            what = f"got {len(submission.label)} characters, allowed is at most {MAX_LABEL_CHARACTERS}"
            self.wrong("label", what)
        if (control := control_character(submission.label)) is not None:
            self.wrong("label", f"has the control character {control}; remove it")

    def model(self, parameters: pb.GenerationParameters, models: Mapping[str, ModelInfo]) -> ModelInfo | None:
        legal = runnable(models)
        wanted = parameters.model or next(iter(legal), "")
        if wanted not in legal:
            names = ", ".join(legal) or "none: no model can be run, see the log of the fusion service"
            why = f", which cannot be run ({models[wanted].problem})" if wanted in models else ""
            self.wrong("parameters.model", f"got {wanted[:80]!r}{why}, allowed is {names}")
        return legal.get(wanted)

    def optional_text(self, parameters: pb.GenerationParameters, field: _NegativeField, default: str) -> str:
        return self.text(field, getattr(parameters, field), fewest=0) if parameters.HasField(field) else default

    def text(self, field: str, text: str, *, fewest: int) -> str:
        cleaned = " ".join(text.split())
        if not fewest <= len(cleaned) <= MAX_PROMPT_CHARACTERS:
            what = f"got {len(cleaned)} characters, allowed is {fewest} to {MAX_PROMPT_CHARACTERS}"
            self.wrong(f"parameters.{field}", f"{what} (white space at the ends not counted)")
        if (control := control_character(cleaned)) is not None:
            self.wrong(f"parameters.{field}", f"has the control character {control}; remove it")
        return cleaned

    def options(self, parameters: pb.GenerationParameters, model: ModelInfo | None) -> SamplingOptions:
        prefix = "parameters.options."
        given = type(parameters.options)()
        given.CopyFrom(parameters.options)
        try:
            options = sampling_options_from_proto(given, prefix=prefix)
        except InvalidRequest as error:
            self.violations.extend(error.violations)
            given.ClearField("solver")
            options = sampling_options_from_proto(given, prefix=prefix)
        num_layers = model.num_layers if model is not None else _ANY_LAYER
        self.violations.extend(check_sampling_options(options, num_layers=num_layers, prefix=prefix))
        return options

    def size(
        self, parameters: pb.GenerationParameters, model: ModelInfo | None, image: ImageInfo | None
    ) -> tuple[int, int]:
        if parameters.HasField("height") != parameters.HasField("width"):
            missing = "width" if parameters.HasField("height") else "height"
            self.wrong(f"parameters.{missing}", "is absent; give both height and width, or neither")
            return 0, 0
        if model is None:
            return 0, 0
        if not parameters.HasField("height"):
            return self.picture_size(image, model) if image else snap_size(1, 1, model.video_area)
        height, width = parameters.height, parameters.width
        smallest = SIZE_MULTIPLE // 2
        legal = legal_size(height, width, model.video_area) if min(height, width) >= smallest else None
        if legal is None:
            nearest = snap_size(max(height, smallest), max(width, smallest), model.video_area)
            self.wrong("parameters.height", _size_message(height, width, model, nearest))
            return 0, 0
        return legal

    def picture_size(self, image: ImageInfo, model: ModelInfo) -> tuple[int, int]:
        snapped = snap_size(image.height, image.width, model.video_area)
        if legal_size(*snapped, model.video_area) != snapped:
            what = f"is {image.width}x{image.height} pixels, too narrow for a frame of {model.id}; crop the picture"
            self.wrong("parameters.image_id", what)
        return snapped

    def num_frames(self, parameters: pb.GenerationParameters, model: ModelInfo | None) -> int:
        if model is None:
            return 0
        if parameters.HasField("num_frames") and parameters.num_frames != model.num_frames:
            what = f"got {parameters.num_frames}, allowed for {model.id} is {model.num_frames} (or nothing)"
            self.wrong("parameters.num_frames", what)
        return model.num_frames

    def vram_mode(self, parameters: pb.GenerationParameters) -> VramMode:
        try:
            return vram_mode_from_proto(parameters.vram_mode, field="parameters.vram_mode")
        except InvalidRequest as error:
            self.violations.extend(error.violations)
            return VramMode.AUTO


def _size_message(height: int, width: int, model: ModelInfo, nearest: tuple[int, int]) -> str:
    common = _sizes(model.sizes)
    return (
        f"got {height}x{width} (height x width), allowed for {model.id} is any size of {model.video_area} pixels"
        f" in multiples of {SIZE_MULTIPLE}; the nearest of this aspect is {_sizes([nearest])}, common are {common}"
    )


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)
