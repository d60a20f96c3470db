"""Loading a model whose weights stay in host memory: one block after the other passes through the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from services.fusion.checkpoint import FusionFile
from services.fusion.memory.streaming import entries_of
from services.fusion.model.block import FusedBlock
from services.fusion.model.fusion import FusionModel
from services.fusion.packing import pack_block
from services.fusion.quantization import is_quantized, quantize_block
from services.fusion.units import Modules, Units, announce
from shared.checkpoints import assign_weights
from shared.memory.estimate import FusionLayout
from shared.memory.host import HostBuffer
from shared.memory.streaming import HostUnit, UnitStream


def load_streamed(
    file: FusionFile,
    device: torch.device,
    dtype: torch.dtype,
    layout: FusionLayout,
    *,
    packed: bool,
) -> tuple[FusionModel, UnitStream]:
    """The model of a file, and what brings its weights to the device; the device holds one block at most meanwhile.

    Quantizing and packing happen on the device, so that every value is that of a model that is there as a whole.

    Args:
        file: checked.
        device: where the model runs.
        dtype: arithmetic of the model.
        layout: format of the wide layers, and which blocks stay on the device until the stream's `release`.
        packed: projections of the same tokens lie side by side.

    Raises:
        CheckpointError: the values cannot be read.
    """
    with torch.device("meta"):
        model = FusionModel(file.config)
    num_layers = file.config.num_layers
    text_blocks, blocks = [], []
    for index, module in enumerate(model.fused_blocks):
        assert isinstance(module, FusedBlock)
        for name, half in (("video_model", module.video), ("audio_model", module.audio)):
            _read(half, f"{name}.blocks.{index}.", file, device, dtype)
            if is_quantized(index, num_layers, layout.weights):
                quantize_block(half, layout.weights)
            if packed:
                pack_block(half)
        text_parts, other_parts = Units.of_block(module)
        text_blocks.append(_to_host(text_parts, device))
        blocks.append(_to_host(other_parts, device))
    for name, tower in (("video_model", model.video_model), ("audio_model", model.audio_model)):
        for part, module in tower.named_children():
            if part != "blocks":
                _read(module, f"{name}.{part}.", file, device, dtype)
    model.requires_grad_(False)
    model.eval()
    units = Units.of(model)
    text, stem, heads = (_to_host(modules, device) for modules in (units.text, units.stem, units.heads))
    audio_stem = [_to_host(modules, device) for modules in units.audio_stem]
    first_of_step = 1 + num_layers
    first_block = first_of_step + 1 + len(audio_stem)
    resident = {first_of_step, first_block + num_layers}
    resident |= {first_block + index for index in layout.resident_blocks(num_layers)}
    if layout.num_resident == num_layers:
        resident |= set(range(first_of_step, first_block))
    stream = UnitStream(
        [text, *text_blocks, stem, *audio_stem, *blocks, heads],
        first_of_step=first_of_step,
        resident=resident,
        device=device,
    )
    announce(model, entries_of(stream, num_layers))
    return model, stream


def _read(module: nn.Module, prefix: str, file: FusionFile, device: torch.device, dtype: torch.dtype) -> None:
    keys = [key for key in file.header.layout if key.startswith(prefix)]
    values = file.header.tensors(device, keys)
    assign_weights(module, {key.removeprefix(prefix): value.to(dtype) for key, value in values})


def _to_host(modules: Modules, device: torch.device) -> HostUnit:
    tensors = dict(_named_tensors(modules))
    unit = HostUnit(tensors, HostBuffer(tensors, pin=device.type == "cuda"))
    unit.point_to(unit.values.views(unit.values.bytes))
    return unit


def _named_tensors(modules: Modules) -> Iterable[tuple[str, torch.Tensor]]:
    for index, module in enumerate(modules):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{index}.{name}", tensor
