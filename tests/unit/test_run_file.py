"""The file of a run's state: readable by anybody, refused when damaged or another run's."""

from __future__ import annotations

import json
from dataclasses import replace

import google_crc32c
import pytest
import torch
from safetensors import safe_open

from services.fusion.sampling.denoise import Latents, RunState
from services.fusion.sampling.run_file import RunShape, UnusableState, mode_of, pack, tensors_of, unpack
from services.fusion.sampling.solvers import history_names
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver

VIDEO, AUDIO = (48, 2, 2, 2), (5, 20)
OPTIONS = SamplingOptions(20)
SHAPE = RunShape(VIDEO, AUDIO, OPTIONS)
IDENTITY = {"model": "tiny", "seed": "7", "inputs": "abc"}


def state_at(steps_done: int, solver: Solver = Solver.UNIPC) -> RunState:
    generator = torch.Generator().manual_seed(steps_done)

    def random(shape):
        return torch.randn(shape, generator=generator)

    names = sorted(history_names(solver, steps_done))
    histories = ({name: random(shape) for name in names} for shape in (VIDEO, AUDIO))
    return RunState(steps_done, 3, Latents(random(VIDEO), random(AUDIO)), *histories)


def test_what_is_read_is_what_was_kept_and_others_can_read_it_too(tmp_path) -> None:
    state = state_at(10)
    file = pack(state, IDENTITY, VramMode.STANDARD)
    read = unpack(file, IDENTITY, SHAPE)
    assert mode_of(file) is VramMode.STANDARD and mode_of(file[:40]) is None and mode_of(file[40:].clone()) is None
    assert (read.steps_done, read.steps_reused) == (10, 3)
    kept = tensors_of(state)
    assert tensors_of(read).keys() == kept.keys() and len(kept) == 8
    assert all(torch.equal(tensors_of(read)[name], value) for name, value in kept.items())
    path = tmp_path / "state.safetensors"
    path.write_bytes(file.numpy().tobytes())
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == kept.keys()
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in kept.items())
        assert opened.metadata()["steps_done"] == "10" and json.loads(opened.metadata()["identity"]) == IDENTITY


def test_one_changed_bit_anywhere_is_noticed() -> None:
    file = pack(state_at(10), IDENTITY, VramMode.STANDARD)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(file), (300,), generator=generator).tolist()
    for place in [*range(0, 700, 7), *places, len(file) - 1]:
        damaged = file.clone()
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(UnusableState):
            unpack(damaged, IDENTITY, SHAPE)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000])
def test_a_file_that_is_cut_off_is_damaged(length) -> None:
    file = pack(state_at(10), IDENTITY, VramMode.STANDARD)
    with pytest.raises(UnusableState, match="damaged"):
        unpack(file[:length], IDENTITY, SHAPE)
    with pytest.raises(UnusableState, match="damaged"):
        unpack(file[: len(file) - 1 - length], IDENTITY, SHAPE)


@pytest.mark.parametrize(
    "file",
    [
        torch.zeros(16, 16, dtype=torch.uint8),
        torch.zeros(64),
        torch.full((4096,), 255, dtype=torch.uint8),
        torch.zeros(4096, dtype=torch.uint8),
    ],
)
def test_what_is_no_file_at_all_is_refused(file) -> None:
    with pytest.raises(UnusableState, match="damaged"):
        unpack(file, IDENTITY, SHAPE)


@pytest.mark.parametrize("name", IDENTITY)
def test_another_run_is_named(name) -> None:
    with pytest.raises(UnusableState, match=f"with another {name}$"):
        unpack(pack(state_at(10), IDENTITY, VramMode.STANDARD), IDENTITY | {name: "other"}, SHAPE)


def forged(change) -> torch.Tensor:
    """A file with another header and a checksum that fits."""
    file = pack(state_at(10), IDENTITY, VramMode.STANDARD).numpy().tobytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    change(header)
    header["__metadata__"]["crc32c"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    values = file[8 + length :]
    checksum = google_crc32c.extend(google_crc32c.value(prefix), values)
    prefix = prefix.replace(b'"crc32c":"00000000"', f'"crc32c":"{checksum:08x}"'.encode())
    return torch.frombuffer(bytearray(prefix + values), dtype=torch.uint8)


def put(name: str, value: object):
    return lambda header: header["__metadata__"].update({name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("steps_done", "0"), "0 steps were done"),
        (put("steps_done", "20"), "20 steps were done"),
        (put("steps_done", "-3"), "-3 steps were done"),
        (put("steps_done", "ten"), "not one of this service"),
        (put("steps_reused", "11"), "11 of them reused"),
        (put("identity", "[]"), "not one of this service"),
        (put("identity", "{"), "not one of this service"),
        (lambda header: header.pop("audio_latent"), "a run of this kind has"),
        (lambda header: header.update(more=header["audio_latent"]), "a run of this kind has"),
        (lambda header: header["video_latent"].update(shape=[48, 2, 2, 1]), "video_latent of the checkpoint is"),
        (lambda header: header["video_latent"].update(dtype="F16"), "video_latent of the checkpoint is"),
        (lambda header: header["audio_latent"].update(data_offsets=[0, 400]), "audio_latent of the checkpoint is"),
    ],
)
def test_a_whole_file_with_impossible_content_is_refused(change, says) -> None:
    assert unpack(forged(lambda header: None), IDENTITY, SHAPE).steps_done == 10
    with pytest.raises(UnusableState, match=says):
        unpack(forged(change), IDENTITY, SHAPE)


def test_a_state_of_another_solver_or_size_does_not_fit() -> None:
    file = pack(state_at(10, Solver.EULER), IDENTITY, VramMode.STANDARD)
    with pytest.raises(UnusableState, match="a run of this kind has"):
        unpack(file, IDENTITY, SHAPE)
    euler = RunShape(VIDEO, AUDIO, replace(OPTIONS, solver=Solver.EULER))
    assert unpack(file, IDENTITY, euler).steps_done == 10
    with pytest.raises(UnusableState, match="video_latent of the checkpoint is"):
        unpack(file, IDENTITY, replace(euler, video=(48, 2, 2, 4)))
