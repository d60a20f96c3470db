"""An encoder whose layers are in host memory and pass through the device."""

from __future__ import annotations

import torch
from torch import nn
from transformers import UMT5EncoderModel

from shared.memory.host import HostBuffer
from shared.memory.streaming import HostUnit, UnitStream


def stream_layers(model: UMT5EncoderModel, device: torch.device) -> UnitStream:
    """Let each layer come to the device as it is called, the last norm for a whole turn. The embedding stays.

    Args:
        model: on the CPU. Its layers' values are copied to memory that the device copies from, one after the other.
        device: where the layers run.

    Raises:
        OutOfMemory: the host's memory cannot be had or locked.
    """
    parts: list[nn.Module] = [*model.encoder.block, model.encoder.final_layer_norm]
    stream = UnitStream(
        [_to_host(part, device) for part in parts], first_of_step=0, resident=(len(parts) - 1,), device=device
    )
    for position, part in enumerate(parts):
        part.register_forward_pre_hook(lambda *_, position=position: stream.enter(position))
    return stream


def _to_host(module: nn.Module, device: torch.device) -> HostUnit:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    unit = HostUnit(tensors, HostBuffer(tensors, pin=device.type == "cuda"))
    unit.point_to(unit.values.views(unit.values.bytes))
    return unit
