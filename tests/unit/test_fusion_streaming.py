"""Streamed weights: the values of resident ones, copied in time, one turn after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.fusion.attention import sdpa
from services.fusion.checkpoint import CONFIG_KEY, FusionFile
from services.fusion.memory.loading import load_streamed
from services.fusion.model.operations import Ops
from services.fusion.packing import pack_projections
from services.fusion.quantization import quantize
from services.fusion.sampling.denoise import Conditions, Latents, bind_forward, bind_guidance, denoise, draw_noise
from shared.memory.estimate import FusionLayout
from shared.memory.host import HostBuffer
from shared.memory.modes import WeightFormat
from shared.memory.sizes import AUDIO_STEM_LAYERS
from shared.memory.streaming import AHEAD, NUM_SLOTS, HostUnit, UnitStream
from shared.sampling_options import SamplingOptions
from tests.fusion_checkpoint import SMALL, random_weights

CPU = torch.device("cpu")
VIDEO, AUDIO = (48, 3, 4, 6), (9, 20)
TEXT_UNITS, STEP_UNITS = 3, 7
NUM_STEPS = 3


class LateLane:
    """Copies are made when somebody waits for them, and never if nobody does."""

    def __init__(self) -> None:
        self._copies: list[Callable[[], None]] = []

    def mark(self) -> None:
        pass

    def copy(self, target, source, after) -> int:
        self._copies.append(lambda: target.copy_(source))
        return len(self._copies)

    def wait(self, mark: int | None) -> None:
        """Copies of one stream are made in order."""
        for index in range(mark or 0):
            self._copies[index]()
            self._copies[index] = lambda: None


class EarlyLane:
    """Copies are made at once, whatever they should wait for; notes what was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.afters: list[int] = []

    def mark(self) -> int:
        self.asked += 1
        return self.asked

    def copy(self, target, source, after) -> None:
        target.copy_(source)
        self.afters.append(after)

    def wait(self, mark) -> None:
        pass


def make_units() -> list[HostUnit]:
    """Unit i holds 4 + i % 3 values i, and one value -i of another type."""
    units = []
    for index in range(TEXT_UNITS + STEP_UNITS):
        tensors = {"a": torch.full((4 + index % 3,), float(index)), "b": torch.tensor([-index], dtype=torch.int8)}
        units.append(HostUnit(tensors, HostBuffer(tensors, pin=False)))
    return units


def value_of(unit: HostUnit) -> tuple[set[float], int]:
    return set(unit.tensors["a"].tolist()), int(unit.tensors["b"])


ORDERS = {
    "jobs": [*range(10), *range(3, 10), *range(3, 10), *range(10), *range(3, 10)],
    "left out": [*range(10), *(3, 4, 6, 7, 8, 9), *(3, 4, 9), *range(3, 10)],
    "again": [0, 0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 9, 3],
    "back": [0, 5, 1, 9, 3, 8, 0, 4],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("resident", [(), (3, 9), (4, 6, 8), range(3, 10), range(10), range(9)], ids=str)
@pytest.mark.parametrize("lane", [LateLane, EarlyLane])
def test_a_unit_that_is_entered_has_its_values_until_the_next_is(order, resident, lane) -> None:
    units = make_units()
    stream = UnitStream(units, first_of_step=TEXT_UNITS, resident=resident, device=CPU, lane=lane())
    for _ in range(2):
        for position in order:
            stream.enter(position)
            assert value_of(units[position]) == ({float(position)}, -position)
        stream.release()


def test_what_comes_next_is_on_its_way_and_nothing_is_copied_twice() -> None:
    units = make_units()
    resident = (4, 6)
    stream = UnitStream(units, first_of_step=TEXT_UNITS, resident=resident, device=CPU)
    for position in range(TEXT_UNITS):
        stream.enter(position)
    for _ in range(3):
        for position in range(TEXT_UNITS, len(units)):
            stream.enter(position)
    streamed_a_step = STEP_UNITS - len(resident)
    assert stream.num_copies == TEXT_UNITS + len(resident) + 3 * streamed_a_step + AHEAD


def test_a_buffer_is_written_only_after_its_unit_was_left() -> None:
    units, lane = make_units(), EarlyLane()
    stream = UnitStream(units, first_of_step=TEXT_UNITS, resident=(), device=CPU, lane=lane)
    begun = []
    for position in range(len(units)):
        stream.enter(position)
        begun.append(lane.asked)
    # The ring has NUM_SLOTS buffers. A copy beyond the first ones waits for a mark that was made as the unit before
    # in that buffer was left, which is when the unit after it was entered.
    for copy, after in enumerate(lane.afters[NUM_SLOTS:], start=NUM_SLOTS):
        left = copy - NUM_SLOTS + 1
        assert begun[left - 1] < after <= begun[left]


def test_memory_is_bounded_and_given_back() -> None:
    units = make_units()
    stream = UnitStream(units, first_of_step=TEXT_UNITS, resident=(4,), device=CPU)
    held: dict[int, int] = {}
    for position in range(len(units)):
        stream.enter(position)
        storage = units[position].tensors["a"].untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    assert sum(held.values()) <= stream.device_bytes
    assert len(held) == 1 + NUM_SLOTS
    stream.release()
    assert {unit.tensors["a"].untyped_storage().data_ptr() for unit in units}.isdisjoint(held)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> FusionFile:
    path: Path = tmp_path_factory.mktemp("streaming") / "model.safetensors"
    extra = {"num_heads": SMALL.num_heads, "text_len": SMALL.text_len}
    save_file(random_weights(SMALL), path, metadata={CONFIG_KEY: json.dumps(extra)})
    return FusionFile.open(path)


def run(model, *, picture: bool) -> Latents:
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(length, SMALL.text_dim, generator=generator) for length in (7, 4))
    first = torch.randn(VIDEO[0], *VIDEO[2:], generator=generator) if picture else None
    predict = bind_guidance(bind_forward(model, model.rope_tables(VIDEO[1:], AUDIO[0]), Ops.of(sdpa)))
    with torch.inference_mode():
        conditions = Conditions(*model.encode_texts([(prompt, prompt), (negative, negative)]), first)
    options = SamplingOptions(NUM_STEPS, slg_layer=1)
    *_, latents = denoise(predict, draw_noise(VIDEO, AUDIO, 5), conditions, options)
    assert isinstance(latents, Latents) and bool(torch.isfinite(latents.video_CFHW).all())
    return latents


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("num_resident", [0, 1, SMALL.num_layers])
def test_streamed_latents_are_those_of_a_resident_model_to_the_bit(file, weights, num_resident) -> None:
    resident = file.load(CPU, torch.float32)
    if weights is not WeightFormat.NATIVE:
        quantize(resident, weights)
    pack_projections(resident)
    layout = FusionLayout(weights, num_resident, token_chunk=None, keep_ends=False)
    streamed, stream = load_streamed(file, CPU, torch.float32, layout, packed=True)
    layers = SMALL.num_layers
    # A step uses stem, audio stem, blocks and heads, in this order and each once.
    step_units = 1 + AUDIO_STEM_LAYERS + layers + 1
    streamed_units = 0 if num_resident == layers else AUDIO_STEM_LAYERS + layers - num_resident
    text_units, ahead = 1 + layers, AHEAD if streamed_units else 0
    for picture in (False, True):
        before = stream.num_copies
        expected, ours = run(resident, picture=picture), run(streamed, picture=picture)
        assert torch.equal(ours.video_CFHW, expected.video_CFHW)
        assert torch.equal(ours.audio_SC, expected.audio_SC)
        once, each_step = text_units + step_units - streamed_units, streamed_units * NUM_STEPS
        assert stream.num_copies - before == once + each_step + ahead, "nothing is copied twice"
        stream.release()


def test_every_weight_is_in_exactly_one_unit(file) -> None:
    layout = FusionLayout(WeightFormat.NATIVE, 0, token_chunk=None, keep_ends=False)
    streamed, stream = load_streamed(file, CPU, torch.bfloat16, layout, packed=False)
    held = [id(tensor) for unit in stream._units for tensor in unit.tensors.values()]
    assert len(held) == len(set(held))
    assert set(held) == {id(tensor) for tensor in streamed.parameters()}
    values = file.load(CPU, torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, values[key]) for key, tensor in streamed.state_dict().items())
