"""Which implementations of the blocks' operations a device gets."""

from __future__ import annotations

import enum
import importlib.util
from dataclasses import dataclass, replace

import torch

from services.fusion.attention import select_attention
from services.fusion.model.layers import Ops


class Kernels(enum.Enum):
    """A switch: all compute the same function, `reference` in plain PyTorch."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"


@dataclass(frozen=True)
class SelectedOps:
    """Operations and their names for DescribeModel, logs and benchmarks."""

    name: str
    ops: Ops


def select_ops(device: torch.device, dtype: torch.dtype, kernels: Kernels = Kernels.AUTO) -> SelectedOps:
    """The best attention installed, and fused kernels where they can run: on CUDA with Triton.

    Raises:
        ValueError: fused kernels are asked for where they cannot run.
    """
    attention = select_attention(device, dtype)
    ops = Ops.of(attention.call)
    can_fuse = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if kernels is Kernels.FUSED and not can_fuse:
        raise ValueError(f"fused kernels need CUDA and Triton; the device is {device}")
    if kernels is Kernels.REFERENCE or not can_fuse:
        return SelectedOps(attention.name, ops)
    from services.fusion.kernels import linear_gelu, norm_and_rope, norm_rope

    tower = replace(ops.video, norm_rope=norm_rope, norm_and_rope=norm_and_rope, linear_gelu=linear_gelu)
    return SelectedOps(f"{attention.name}, fused kernels", Ops(tower, tower))
