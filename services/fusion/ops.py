"""Which implementations of the blocks' operations a device gets."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from services.fusion.attention import select_attention
from services.fusion.model.operations import KV, Ops, TextKV
from services.fusion.quantization import Fp8Operations, has_fp8_products
from shared.memory.modes import WeightFormat


class Kernels(enum.Enum):
    """A switch: all compute the same function, `reference` in plain PyTorch."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"


@dataclass(frozen=True)
class Execution:
    """How passes are computed; the default is the fastest lossless way of the device."""

    kernels: Kernels = Kernels.AUTO
    graphs: bool | None = None
    """Steps are recorded as CUDA graphs; None: where it pays, see parallelize.make_predictor."""
    weights: WeightFormat = WeightFormat.NATIVE
    """How the wide layers are held, see services.fusion.quantization."""


@dataclass(frozen=True)
class SelectedOps:
    """Operations and their names for DescribeModel, logs and benchmarks."""

    name: str
    ops: Ops
    fused: bool
    """Whether projections side by side are used, see services.fusion.packing."""


class SideStream:
    """Together on CUDA: the second piece of work runs on a stream of its own, so that small kernels fill gaps."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """See Together. The caller keeps what both read until this returns, so no memory is reused too early."""
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            beside = second()
        result = first()
        main.wait_stream(self._stream)
        return result, beside


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
        return SelectedOps(attention.name, ops, fused=False)
    from services.fusion import kernels as fused

    linears, feed_forward = fused.linears, fused.feed_forward
    if has_fp8_products(device):
        fp8 = Fp8Operations(fused.quantize_rows, fused.quantize_gelu_rows, linears, feed_forward)
        linears, feed_forward = fp8.linears, fp8.feed_forward
    audio = replace(
        ops.audio,
        norm_rope=fused.norm_rope,
        norm_and_rope=fused.norm_and_rope,
        residual_norms=fused.residual_norms,
        linears=linears,
        feed_forward=feed_forward,
        pack_heads=fused.pack_heads,
        unpack_heads=fused.unpack_heads,
    )

    def joint_attention(q_TNK: torch.Tensor, text: TextKV, rotated_q_TNK: torch.Tensor, other: KV) -> torch.Tensor:
        if q_TNK.shape[-1] in fused.JOINT_HEAD_DIMS and q_TNK.dtype in (torch.bfloat16, torch.float16):
            return fused.joint_attention(q_TNK, text, rotated_q_TNK, other)
        return audio.attend_jointly(q_TNK, text, rotated_q_TNK, other)

    # Many video tokens attend to few others; for the few audio tokens the attention kernels are the better ones.
    video = replace(audio, joint_attention=joint_attention)
    return SelectedOps(f"{attention.name}, fused kernels", Ops(video, audio, SideStream(device)), fused=True)
