"""Jobs in words and numbers for people."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from ovi.gateway.v1 import gateway_pb2 as pb
from shared.memory.modes import RECIPES
from shared.system_proto import vram_mode_from_proto

STAGES: dict[pb.JobStage.ValueType, tuple[str, str, str]] = {
    pb.JOB_STAGE_ENCODE_PROMPT: ("encode_prompt", "prompt", ""),
    pb.JOB_STAGE_ENCODE_IMAGE: ("encode_image", "picture", ""),
    pb.JOB_STAGE_DENOISE: ("denoise", "denoise", "steps"),
    pb.JOB_STAGE_DECODE: ("decode", "decode", "frames"),
}
"""Stage -> its key in Job.stage_seconds, its name for people, what its progress counts."""

STATE_STYLES: dict[pb.JobState.ValueType, str] = {
    pb.JOB_STATE_QUEUED: "yellow",
    pb.JOB_STATE_PAUSED: "magenta",
    pb.JOB_STATE_RUNNING: "cyan",
    pb.JOB_STATE_COMPLETED: "green",
    pb.JOB_STATE_FAILED: "red",
    pb.JOB_STATE_CANCELLED: "dim",
}


def state_word(state: pb.JobState.ValueType) -> str:
    """JOB_STATE_RUNNING -> "running"."""
    return pb.JobState.Name(state).removeprefix("JOB_STATE_").lower()


def size_text(num_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def as_dict(message: Message) -> dict[str, object]:
    """A message for --json: the protocol's own field names, fields without a value included."""
    fields: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def describe_video(video: pb.Video) -> str:
    """Length, size and weight of a clip; how memory was used, if that changed it."""
    seconds = video.num_frames / max(video.fps, 1)
    words = f"{seconds:.2f} s, {video.size.width}x{video.size.height}, {video.fps} fps, {size_text(video.num_bytes)}"
    recipe = RECIPES.get(vram_mode_from_proto(video.vram_mode, field="video.vram_mode"))
    return words if recipe is None or recipe.lossless else f"{words}, lossy ({recipe.weights.value} weights)"
