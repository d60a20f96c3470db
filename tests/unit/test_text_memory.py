"""The text encoder's layers wherever they are: the same rows, memory given back, refusals with numbers."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch

from services.text_encoder.engine import TextEncoder, TextEngine
from services.text_encoder.memory import TextEncoderMemory, mode_problem
from shared.errors import CheckpointError, InvalidRequest, OutOfMemory
from shared.memory.modes import TextEncoderPlace, VramMode
from shared.memory.sizes import RELEASED_TEXT_ENCODER
from shared.variants import TEXT_ENCODER_FILE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
RESIDENT, STREAMED = TextEncoderPlace.RESIDENT, TextEncoderPlace.STREAMED
PROMPTS = ("rain", "", "a much longer prompt about a lighthouse keeper at the coast")


def make_encoder(folder: Path, place: TextEncoderPlace, precision: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder.load(folder / TEXT_ENCODER_FILE, device=CPU, precision=precision, place=place)


def make_engine(folder: Path, place: TextEncoderPlace) -> TextEngine:
    return TextEngine.read(folder, device=CPU, precision=torch.float32, cache_bytes=0, place=place)


def rows(engine: TextEngine) -> list[torch.Tensor]:
    return [item.embedding.rows_LC for item in engine.encode(PROMPTS, 0)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_streamed_rows_are_resident_ones_to_the_bit(tiny_checkpoint: Path, precision: torch.dtype) -> None:
    resident, streamed = (make_encoder(tiny_checkpoint, place, precision) for place in (RESIDENT, STREAMED))
    for turn in range(2):
        for ids in ([1], list(range(3, 300)), [7, 7, 9, 1]):
            expected = resident.encode(ids)
            assert expected.dtype is precision and expected.float().std() > 0.1
            assert torch.equal(streamed.encode(ids), expected), (turn, len(ids))
        streamed.release()


def test_the_device_holds_a_few_layers_at_once_and_nothing_after_a_turn(tiny_checkpoint: Path) -> None:
    encoder = make_encoder(tiny_checkpoint, STREAMED)
    stream, blocks = encoder._stream, encoder._model.encoder.block
    assert stream is not None
    weights = [block.layer[1].DenseReluDense.wo.weight for block in blocks]
    host = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
    for block, weight in zip(blocks, weights, strict=True):
        block.register_forward_hook(
            lambda *_, weight=weight: seen.update(
                {weight.untyped_storage().data_ptr(): weakref.ref(weight.untyped_storage())}
            )
        )
    embedding = encoder._model.get_input_embeddings().weight
    before = embedding.data_ptr()
    encoder.encode([3, 4, 5])
    layer_bytes = max(sum(value.nbytes for value in block.parameters()) for block in blocks)
    assert len(host) == len(blocks) and not host & seen.keys()
    assert len(seen) <= 3 and all(storage() is not None for storage in seen.values())
    assert stream.device_bytes < 3.01 * layer_bytes + 4096
    encoder.release()
    assert all(storage() is None for storage in seen.values())
    assert {weight.untyped_storage().data_ptr() for weight in weights} == host
    assert embedding.data_ptr() == before, "the token embedding stays in the file's memory"


def test_an_engine_gives_the_device_back_after_every_request(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, STREAMED)
    rows(engine)
    stream = engine._encoder._stream
    assert stream is not None and not stream._ring and not stream._places
    items = engine.encode(PROMPTS, 0)
    next(items)
    assert stream._ring
    items.close()
    assert not stream._ring, "a request that is cancelled, too"


def test_layers_are_moved_there_and_back(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, RESIDENT)
    expected, fingerprint = rows(engine), engine.fingerprint
    for place in (STREAMED, RESIDENT, RESIDENT, STREAMED):
        weight = weakref.ref(engine._encoder._model.encoder.block[0].layer[0].SelfAttention.q.weight.untyped_storage())
        stays = place is engine.place
        engine.move(place)
        assert (engine.place, engine.fingerprint) == (place, fingerprint)
        assert (weight() is not None) == stays, "the weights that were there are let go of"
        for ours, before in zip(rows(engine), expected, strict=True):
            assert torch.equal(ours, before)


def test_a_move_that_fails_leaves_the_layers_where_they_were(tiny_checkpoint: Path) -> None:
    engine = make_engine(tiny_checkpoint, RESIDENT)
    expected, load = rows(engine), engine._load

    def no_room(place: TextEncoderPlace) -> TextEncoder:
        if place is STREAMED:
            raise OutOfMemory("0.10 GiB of host memory cannot be locked")
        return load(place)

    engine._load = no_room
    with pytest.raises(OutOfMemory, match="host memory"):
        engine.move(STREAMED)
    assert engine.place is RESIDENT
    assert torch.equal(rows(engine)[0], expected[0])


def test_modes_put_the_layers_where_they_say() -> None:
    on_gpu = TextEncoderMemory(GPU, RELEASED_TEXT_ENCODER, 24 * GIB)
    places = {mode: on_gpu.plan(mode).place for mode in VramMode if mode is not VramMode.AUTO}
    assert {mode for mode, place in places.items() if place is RESIDENT} == {VramMode.STANDARD, VramMode.ALL_GPU}
    assert {place for place in places.values() if place is not RESIDENT} == {STREAMED}
    assert on_gpu.takes_turns(VramMode.STREAMED) and not on_gpu.takes_turns(VramMode.STANDARD)
    on_cpu = dataclasses.replace(on_gpu, device=CPU, budget_bytes=None)
    assert {on_cpu.place(mode) for mode in places} == {TextEncoderPlace.CPU}
    assert not on_cpu.takes_turns(VramMode.ULTRA_LOW)
    assert on_cpu.settle(VramMode.AUTO) is VramMode.STANDARD


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_would() -> None:
    memory = TextEncoderMemory(GPU, RELEASED_TEXT_ENCODER, 9 * GIB)
    with pytest.raises(OutOfMemory, match=r"standard needs 1\d\.\d GiB .*, 9\.0 GiB may be used; streamed fits"):
        memory.settle(VramMode.STANDARD)
    assert memory.settle(VramMode.STREAMED) is VramMode.STREAMED
    assert memory.plan(VramMode.STREAMED).components.reserved < 2 * GIB
    with pytest.raises(OutOfMemory, match=r"0\.5 GiB may be used; run the text encoder on the CPU"):
        dataclasses.replace(memory, budget_bytes=GIB // 2).settle(VramMode.STREAMED)
    assert "pass through the device in turns" in memory.explain(VramMode.STREAMED)


def test_a_cpu_is_refused_where_everything_shall_be_on_a_gpu() -> None:
    assert "CPU" in (mode_problem(VramMode.ALL_GPU, CPU) or "")
    assert mode_problem(VramMode.ALL_GPU, GPU) is None
    with pytest.raises(InvalidRequest, match="vram_mode"):
        TextEncoderMemory(CPU, RELEASED_TEXT_ENCODER, None).settle(VramMode.ALL_GPU)


def test_a_damaged_file_is_named_when_it_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / TEXT_ENCODER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=path.name):
        make_encoder(tmp_path, STREAMED)
