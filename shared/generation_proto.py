"""Protobuf <-> domain of the words that more than one service speaks."""

from __future__ import annotations

from typing import Any, Literal

from ovi.common.v1 import generation_pb2 as pb
from shared.errors import InvalidRequest
from shared.sampling_options import SamplingOptions, Solver
from shared.variants import PromptFormat

_SOLVERS = {pb.SOLVER_UNIPC: Solver.UNIPC, pb.SOLVER_DPMPP: Solver.DPMPP, pb.SOLVER_EULER: Solver.EULER}
_SOLVERS_TO_PROTO = {solver: proto for proto, solver in _SOLVERS.items()}
_FORMATS = {
    pb.PROMPT_FORMAT_UNSPECIFIED: PromptFormat.AS_IS,
    pb.PROMPT_FORMAT_AUDIO_LINE: PromptFormat.AUDIO_LINE,
    pb.PROMPT_FORMAT_AUDCAP_TAGS: PromptFormat.AUDCAP_TAGS,
}
_FORMATS_TO_PROTO = {form: proto for proto, form in _FORMATS.items()}
_OPTIONAL_FIELDS: tuple[
    Literal[
        "num_inference_steps",
        "video_guidance_scale",
        "audio_guidance_scale",
        "flow_shift",
        "slg_layer",
        "seed",
        "step_cache_threshold",
    ],
    ...,
] = (
    "num_inference_steps",
    "video_guidance_scale",
    "audio_guidance_scale",
    "flow_shift",
    "slg_layer",
    "seed",
    "step_cache_threshold",
)


def sampling_options_from_proto(message: pb.SamplingOptions, *, prefix: str) -> SamplingOptions:
    """The options of a request, absent fields at their defaults; limits are checked elsewhere.

    Raises:
        InvalidRequest: a solver number that has no name.
    """
    given: dict[str, Any] = {field: getattr(message, field) for field in _OPTIONAL_FIELDS if message.HasField(field)}
    if message.solver != pb.SOLVER_UNSPECIFIED:
        if message.solver not in _SOLVERS:
            names = ", ".join(pb.Solver.Name(value) for value in _SOLVERS)
            raise InvalidRequest.of(f"{prefix}solver", f"got {message.solver}, allowed is {names}")
        given["solver"] = _SOLVERS[message.solver]
    return SamplingOptions(**given)


def sampling_options_to_proto(options: SamplingOptions) -> pb.SamplingOptions:
    """The wire form, every field set."""
    given = {field: getattr(options, field) for field in _OPTIONAL_FIELDS}
    return pb.SamplingOptions(solver=_SOLVERS_TO_PROTO[options.solver], **given)


def prompt_format_from_proto(value: pb.PromptFormat.ValueType, *, field: str) -> PromptFormat:
    """The format a number stands for.

    Raises:
        InvalidRequest: a number that has no name.
    """
    if value not in _FORMATS:
        names = ", ".join(pb.PromptFormat.Name(known) for known in _FORMATS)
        raise InvalidRequest.of(field, f"got {value}, allowed is {names}")
    return _FORMATS[value]


def prompt_format_to_proto(form: PromptFormat) -> pb.PromptFormat.ValueType:
    """The number of a format."""
    return _FORMATS_TO_PROTO[form]


def size_to_proto(height: int, width: int) -> pb.Size:
    """The wire form of a size in pixels."""
    return pb.Size(height=height, width=width)
