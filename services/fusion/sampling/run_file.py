"""The state of a run as a safetensors file, so that another process can go on with the run.

The file says of which run it is: everything that decides the latents to the bit, as names and values. A file of another
run, and one that is not whole, is refused rather than guessed at.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import torch

from services.fusion.sampling.denoise import Latents, RunState
from services.fusion.sampling.solvers import history_names
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions

Identity = Mapping[str, str]
"""What decides the latents of a run to the bit, by name."""

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
_NO_CHECKSUM = b'"crc32c":"00000000"'
_CHECKSUM_START = b'"crc32c":"'
_CHECKSUM_DIGITS = 8
_VIDEO, _AUDIO = "video_latent", "audio_latent"
_VIDEO_SOLVER, _AUDIO_SOLVER = "video_solver.", "audio_solver."


class UnusableState(Exception):
    """A file from which a run cannot go on; the message says why."""


@dataclass(frozen=True)
class RunShape:
    """What the tensors of a run's state look like."""

    video: tuple[int, ...]
    audio: tuple[int, ...]
    options: SamplingOptions


def tensors_of(state: RunState) -> dict[str, torch.Tensor]:
    """All tensors of a state, by the names that they have in a file."""
    return {
        _VIDEO: state.latents.video_CFHW,
        _AUDIO: state.latents.audio_SC,
        **{_VIDEO_SOLVER + name: tensor for name, tensor in state.video_history.items()},
        **{_AUDIO_SOLVER + name: tensor for name, tensor in state.audio_history.items()},
    }


def state_of(steps_done: int, steps_reused: int, tensors: Mapping[str, torch.Tensor]) -> RunState:
    """The state whose `tensors_of` these are."""

    def history(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    latents = Latents(tensors[_VIDEO], tensors[_AUDIO])
    return RunState(steps_done, steps_reused, latents, history(_VIDEO_SOLVER), history(_AUDIO_SOLVER))


def pack(state: RunState, identity: Identity, mode: VramMode) -> torch.Tensor:
    """The file of a state: uint8, on the CPU. Where the state is on a GPU, copied beside the work that goes on there.

    Args:
        state: complete; nothing writes to its tensors any more.
        identity: of its run.
        mode: in which the run is made.
    """
    tensors = tensors_of(state)
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    metadata = {
        "identity": json.dumps(dict(identity), sort_keys=True),
        "steps_done": str(state.steps_done),
        "steps_reused": str(state.steps_reused),
        "vram_mode": mode.value,
        "crc32c": "0" * _CHECKSUM_DIGITS,
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = bytearray(_LENGTH.pack(len(text)) + text)
    file = torch.empty(len(header) + end, dtype=torch.uint8)
    values = file[len(header) :]
    with _beside(state.latents.video_CFHW.device):
        for name, tensor in tensors.items():
            start, end = entries[name]["data_offsets"]
            values[start:end].view(torch.float32).view(tensor.shape).copy_(tensor)
    checksum = f"{_checksum(bytes(header), values):08x}".encode()
    place = header.index(_NO_CHECKSUM) + len(_CHECKSUM_START)
    header[place : place + _CHECKSUM_DIGITS] = checksum
    file[: len(header)] = torch.frombuffer(header, dtype=torch.uint8)
    return file


def unpack(file: torch.Tensor, identity: Identity, shape: RunShape) -> RunState:
    """The state in a file, on the CPU; its tensors share the file's memory.

    Args:
        file: uint8, one dimension, contiguous, on the CPU.
        identity: of the run that is to go on.
        shape: of that run.

    Raises:
        UnusableState: damaged, or of another run.
    """
    header, values = _split(file)
    place = header.find(_CHECKSUM_START)
    if place < 0:
        raise UnusableState("the checkpoint is damaged: it has no checksum")
    place += len(_CHECKSUM_START)
    told = header[place : place + _CHECKSUM_DIGITS]
    unmarked = header[:place] + b"0" * _CHECKSUM_DIGITS + header[place + _CHECKSUM_DIGITS :]
    if told != f"{_checksum(unmarked, values):08x}".encode():
        raise UnusableState("the checkpoint is damaged: its checksum is wrong")
    try:
        entries = json.loads(header[_LENGTH.size :])
        metadata = entries.pop("__metadata__")
        kept = json.loads(metadata["identity"])
        others = sorted(name for name in {*kept, *identity} if kept.get(name) != identity.get(name))
        steps_done, steps_reused = int(metadata["steps_done"]), int(metadata["steps_reused"])
        if others:
            raise UnusableState(f"the checkpoint is of a run with another {', '.join(others)}")
        if not 0 < steps_done < shape.options.num_inference_steps or not 0 <= steps_reused <= steps_done:
            raise UnusableState(f"the checkpoint says that {steps_done} steps were done, {steps_reused} of them reused")
        tensors = _views(entries, values, shape, steps_done)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableState(f"the checkpoint is not one of this service ({type(error).__name__})") from None
    return state_of(steps_done, steps_reused, tensors)


def mode_of(file: torch.Tensor) -> VramMode | None:
    """The mode of the run that a file is of; None if it does not tell. Whether the file is whole is not looked at."""
    try:
        header, _ = _split(file)
        return VramMode(json.loads(header[_LENGTH.size :])["__metadata__"]["vram_mode"])
    except (UnusableState, ValueError, TypeError, KeyError, RecursionError):
        return None


def _split(file: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """Header, with its length in front, and values."""
    if file.dtype is not torch.uint8 or file.dim() != 1 or len(file) < _LENGTH.size:
        raise UnusableState(f"the checkpoint is damaged: {file.dtype} of shape {list(file.shape)} is no file")
    (length,) = _LENGTH.unpack(file[: _LENGTH.size].numpy().tobytes())
    end = _LENGTH.size + length
    if length > _MAX_HEADER_BYTES or length % 8 or end > len(file):
        raise UnusableState(f"the checkpoint is damaged: {len(file)} bytes with a header of {length}")
    return file[:end].numpy().tobytes(), file[end:]


def _views(
    entries: Mapping[str, Any], values: torch.Tensor, shape: RunShape, steps_done: int
) -> dict[str, torch.Tensor]:
    """The tensors that a state after so many steps has, no more and no fewer, one after the other."""
    names = history_names(shape.options.solver, steps_done)
    expected = {_VIDEO: shape.video, _AUDIO: shape.audio}
    expected |= {_VIDEO_SOLVER + name: shape.video for name in names}
    expected |= {_AUDIO_SOLVER + name: shape.audio for name in names}
    if entries.keys() != expected.keys():
        raise UnusableState(f"the checkpoint has {sorted(entries)}, a run of this kind has {sorted(expected)}")
    tensors = {}
    position = 0
    for name, entry in entries.items():
        start, position = position, position + math.prod(expected[name]) * torch.float32.itemsize
        if entry != {"dtype": "F32", "shape": list(expected[name]), "data_offsets": [start, position]}:
            raise UnusableState(f"{name} of the checkpoint is {str(entry)[:200]}, not float32 {list(expected[name])}")
        if position > len(values):
            raise UnusableState(f"the checkpoint is damaged: {name} is cut off")
        tensors[name] = values[start:position].view(torch.float32).view(expected[name])
    return tensors


def _checksum(header: bytes, values: torch.Tensor) -> int:
    checksum = google_crc32c.Checksum(header)
    content = memoryview(values.numpy())  # type: ignore[arg-type]
    for start in range(0, len(content), _CHUNK_BYTES):
        checksum.update(bytes(content[start : start + _CHUNK_BYTES]))
    return int.from_bytes(checksum.digest(), "big")


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a GPU, with a stream of its own: a copy then waits for no kernel of the run."""
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield
    else:
        yield
