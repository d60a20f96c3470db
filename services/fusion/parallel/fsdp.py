"""Sharded weights: a rank holds its rows of every parameter, and all rows only while it computes with them.

FSDP2 (`fully_shard`, arXiv 2304.11277) gathers one unit of the model after the other, see `services.fusion.units`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from services.fusion.checkpoint import FusionFile
from services.fusion.model.config import FusionConfig
from services.fusion.model.fusion import FusionModel
from services.fusion.units import Entries, Modules, Units, announce
from shared.checkpoints import assign_weights


class Conveyor:
    """Makes the parameters of one unit after the other whole, the next one while the present one is computed with.

    Gathers are collectives, so every rank has to begin them in the same order. One unit passed over is a block that
    some of the ranks leave out (skip-layer guidance): it is gathered and dropped. Where more are passed over, all ranks
    do so (a step that reuses an earlier one), and none is gathered.
    """

    def __init__(self, text_units: Sequence[FSDPModule], step_units: Sequence[FSDPModule]) -> None:
        """
        Args:
            text_units: in the order in which prompts are encoded.
            step_units: in the order of a step.
        """
        self._units = (*text_units, *step_units)
        self._first_of_step = len(text_units)
        self._position: int | None = None
        """Of the unit that is whole; None before the first."""
        self._coming: dict[FSDPModule, UnshardHandle] = {}

    def enter(self, position: int) -> None:
        """Before anything of a unit is used; position among the text's units and then the step's."""
        if position == self._position:
            return
        if self._position is not None and position == self._position + 2:
            self._arrive(position - 1)
        self._arrive(position)

    def _arrive(self, position: int) -> None:
        if self._position is not None:
            self._units[self._position].reshard()
        self._begin(position)
        self._coming.pop(self._units[position]).wait()
        self._position = position
        # After the last unit of a step comes the first of the next.
        self._begin(position + 1 if position + 1 < len(self._units) else self._first_of_step)

    def _begin(self, position: int) -> None:
        unit = self._units[position]
        if unit not in self._coming:
            handle = unit.unshard(async_op=True)
            assert handle is not None
            self._coming[unit] = handle


class _Unit(nn.Module):
    """Modules whose parameters travel together; never called, so that the conveyor alone decides when."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)


def shard_model(model: FusionModel, mesh: DeviceMesh) -> None:
    """Shard every parameter by rows and let the model's own entry points gather them.

    Args:
        model: its parameters may be on the meta device.
        mesh: (ranks that share the weights) or (copies, ranks that share a copy).
    """

    def sharded(modules: Modules) -> FSDPModule:
        return fully_shard(_Unit(modules), mesh=mesh)

    units = Units.of(model)
    text_units = [sharded(modules) for modules in (units.text, *units.text_blocks)]
    step_units = [sharded(modules) for modules in (units.stem, *units.audio_stem, *units.blocks, units.heads)]
    conveyor = Conveyor(text_units, step_units)
    stem, last = len(text_units), len(text_units) + len(step_units) - 1
    first_block = stem + 1 + len(units.audio_stem)
    entries = Entries(
        text=lambda: conveyor.enter(0),
        text_block=lambda index: conveyor.enter(1 + index),
        stem=lambda: conveyor.enter(stem),
        audio_stem=lambda index: conveyor.enter(stem + 1 + index),
        block=lambda index: conveyor.enter(first_block + index),
        heads=lambda: conveyor.enter(last),
    )
    announce(model, entries)


def sharded_on_meta(config: FusionConfig, mesh: DeviceMesh, dtype: torch.dtype) -> FusionModel:
    """A sharded model without values; those of `state_dict` are DTensors on the meta device."""
    with torch.device("meta"):
        model = FusionModel(config).to(dtype)
    shard_model(model, mesh)
    return model


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """The rows [start, stop) of a parameter that this rank holds."""
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    rows = parameter.shape[0]
    each = -(-rows // parameter.device_mesh.size(-1))
    start = min(each * coordinate[-1], rows)
    return start, min(start + each, rows)


def load_sharded(file: FusionFile, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> FusionModel:
    """The model of a file with this rank's rows on `device` in `dtype`; no others are read. No collective.

    Args:
        file: checked.
        mesh: see `shard_model`.
        device: of this rank.
        dtype: arithmetic of the model.

    Raises:
        CheckpointError: the values cannot be read.
    """
    model = sharded_on_meta(file.config, mesh, dtype)
    parameters: dict[str, DTensor] = model.state_dict()
    wanted = {key: own_rows(parameter) for key, parameter in parameters.items()}
    weights = {key: whole_of(rows.to(dtype), parameters[key]) for key, rows in file.header.rows(wanted, device)}
    assign_weights(model, weights)
    return model


def whole_of(rows: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's rows as its part of a tensor that is spread like another."""
    whole: DTensor = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole
