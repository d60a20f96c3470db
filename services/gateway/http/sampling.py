"""Reading what all APIs ask for in other names: sampling options, memory mode, priority."""

from __future__ import annotations

from collections.abc import Mapping

from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.http.reading import FieldReader
from services.gateway.jobs.domain import HIGHEST_PRIORITY, LOWEST_PRIORITY
from shared.memory.modes import VramMode
from shared.sampling_options import MAX_SEED, MAX_STEPS, Solver
from shared.system_proto import vram_mode_to_proto

SOLVERS = {
    Solver.UNIPC.value: generation_pb2.SOLVER_UNIPC,
    Solver.DPMPP.value: generation_pb2.SOLVER_DPMPP,
    Solver.EULER.value: generation_pb2.SOLVER_EULER,
}
_WHOLE = {"num_inference_steps": (1, MAX_STEPS), "slg_layer": (0, 10_000), "seed": (0, MAX_SEED)}
"""Ranges that fit the message; what the model allows is checked behind it."""
MODES = {mode.value: vram_mode_to_proto(mode) for mode in VramMode}


def read_sampling(reader: FieldReader, names: Mapping[str, str], options: generation_pb2.SamplingOptions) -> None:
    """Fill in the options that were given.

    Args:
        reader: of the request.
        names: the client's name of a field to that of `SamplingOptions`.
        options: filled in.
    """
    for field, name in names.items():
        if name == "solver":
            options.solver = reader.choice(field, SOLVERS) or options.solver
            continue
        value = reader.whole(field, *_WHOLE[name]) if name in _WHOLE else reader.number(field)
        if value is not None:
            setattr(options, name, value)


def read_vram_mode(reader: FieldReader, field: str, wanted: pb.GenerationParameters) -> None:
    """Fill in the memory mode if it was given."""
    wanted.vram_mode = reader.choice(field, MODES) or wanted.vram_mode


def read_priority(reader: FieldReader, field: str) -> int | None:
    """The priority if it was given."""
    return reader.whole(field, LOWEST_PRIORITY, HIGHEST_PRIORITY)


def refuse_lora(reader: FieldReader, field: str) -> None:
    """Note a violation if a LoRA is asked for: there are none."""
    if reader.raw(field) not in (None, "", [], {}):
        reader.wrong(field, "names a LoRA, and this gateway has none; leave it out")
