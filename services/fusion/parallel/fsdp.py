"""Sharded weights: a rank holds its rows of every parameter, and all rows only while it computes with them.

FSDP2 (`fully_shard`, arXiv 2304.11277) gathers one unit of the model after the other: the stems, each block, the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from services.fusion.checkpoint import FusionFile
from services.fusion.model.block import FusedBlock, TowerBlock
from services.fusion.model.config import FusionConfig
from services.fusion.model.fusion import FusionModel
from shared.checkpoints import assign_weights


class Conveyor:
    """Makes the parameters of one unit after the other whole, the next one while the present one is computed with.

    Gathers are collectives, so every rank has to begin them in the same order. One unit passed over is a block that
    some of the ranks leave out (skip-layer guidance): it is gathered and dropped. Where more are passed over, all ranks
    do so (a step that reuses an earlier one), and none is gathered.
    """

    def __init__(self, stem: FSDPModule, blocks: Sequence[FSDPModule], heads: FSDPModule, text: FSDPModule) -> None:
        """
        Args:
            stem: what makes tokens and time rows.
            blocks: in order.
            heads: what follows the blocks.
            text: what goes before the blocks when a prompt is encoded.
        """
        self._stages = (stem, *blocks, heads)
        self._text = text
        self._present: FSDPModule | None = None
        self._position = 0
        self._passes = 0
        self._passes_before = 1
        self._coming: dict[FSDPModule, UnshardHandle] = {}

    def enter(self, position: int) -> None:
        """Before anything of a pass's unit is used: 0 the stem, 1 the first block, the last the heads."""
        if self._present is self._stages[position]:
            return
        if position == self._position + 2:
            self._arrive(self._stages[position - 1], position - 1)
        self._arrive(self._stages[position], position)

    def enter_text(self) -> None:
        """Before the text embedding is used."""
        if self._present is not self._text:
            self._arrive(self._text, 0)

    def _arrive(self, unit: FSDPModule, position: int) -> None:
        if self._present is not None:
            self._present.reshard()
        self._begin(unit)
        self._coming.pop(unit).wait()
        self._present, self._position = unit, position
        self._begin(self._next())

    def _next(self) -> FSDPModule:
        """What probably follows; as many passes follow one visit of the stem as did the time before."""
        if self._present is self._stages[0]:
            self._passes_before, self._passes = max(self._passes, 1), 0
        if self._position + 1 < len(self._stages):
            return self._stages[self._position + 1]
        self._passes += 1
        return self._stages[1] if self._passes < self._passes_before else self._stages[0]

    def _begin(self, unit: FSDPModule) -> None:
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

    def unit(*modules: nn.Module) -> FSDPModule:
        return fully_shard(_Unit(modules), mesh=mesh)

    towers = (model.video_model, model.audio_model)
    stem = unit(
        *(tower.patch_embedding for tower in towers),
        *(tower.time_embedding for tower in towers),
        *(tower.time_projection for tower in towers),
    )
    text = unit(*(tower.text_embedding for tower in towers))
    blocks = [unit(block) for block in model.fused_blocks]
    heads = unit(*(tower.head for tower in towers))
    conveyor = Conveyor(stem, blocks, heads, text)
    for tower in towers:
        _before(tower, "embed", partial(conveyor.enter, 0))
        _before(tower, "time_rows", partial(conveyor.enter, 0))
        _before(tower.text_embedding, "forward", conveyor.enter_text)
        _before(tower.head, "forward", partial(conveyor.enter, len(blocks) + 1))
    for position, block in enumerate(model.fused_blocks, start=1):
        assert isinstance(block, FusedBlock)
        enter = partial(conveyor.enter, position)
        for method in ("begin", "finish"):
            _before(block, method, enter)
        for half in (block.video, block.audio):
            assert isinstance(half, TowerBlock)
            _before(half.cross_attn, "text_kv", enter)


def _before(module: nn.Module, method: str, enter: Callable[[], None]) -> None:
    """Have a module enter its unit before one of its methods runs."""
    run = getattr(module, method)

    def enter_and_run(*args: Any, **kwargs: Any) -> Any:
        enter()
        return run(*args, **kwargs)

    setattr(module, method, enter_and_run)


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
