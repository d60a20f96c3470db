"""Projections of the same tokens, side by side in memory, so that they can be one matrix product."""

from __future__ import annotations

import torch
from torch import nn

from services.fusion.model.block import TowerBlock
from services.fusion.model.fusion import FusionModel


def joint_rows(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """The one tensor of which these are consecutive rows, without a copy; None if there is none."""
    if not tensors:
        return None
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return None
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())


@torch.no_grad()
def pack_block(block: TowerBlock) -> None:
    """Move weights and biases of q, k, v and of k_fusion, v_fusion next to each other; names and values stay."""
    own, cross = block.self_attn, block.cross_attn
    _pack((own.q, own.k, own.v))
    _pack((cross.k_fusion, cross.v_fusion))


def pack_projections(model: FusionModel) -> None:
    """The same in every block of both towers."""
    for tower in (model.video_model, model.audio_model):
        for block in tower.blocks:
            assert isinstance(block, TowerBlock)
            pack_block(block)


def _pack(layers: tuple[nn.Module, ...]) -> None:
    for name, _ in [*layers[0].named_parameters(), *layers[0].named_buffers()]:
        tensors = [getattr(layer, name) for layer in layers]
        # As bytes: not every operation knows every 8-bit type.
        packed = torch.cat([tensor.detach().view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
        for tensor, rows in zip(tensors, packed.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = rows
