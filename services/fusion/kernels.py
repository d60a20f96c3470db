"""Triton kernels that do in one pass over memory what the reference operations do in several.

Statistics and rotation are in float32; each result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.fusion.model.layers import EPS, Rope


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rope_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rotation_ptr,
    normed_ptr,
    rotated_ptr,
    dim: tl.constexpr,
    half_head: tl.constexpr,
    eps: tl.constexpr,
    keep_normed: tl.constexpr,
    block: tl.constexpr,
):
    """One token: RMS norm over `dim` channels, then rotation of adjacent pairs by the token's (half_head, 2) table."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    mask = channel < dim
    x = tl.load(x_ptr + token * dim + channel, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
    weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    normed = x * inverse_rms * weight
    if keep_normed:
        tl.store(normed_ptr + token * dim + channel, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    even, odd = tl.split(tl.reshape(normed, (block // 2, 2)))
    pair = tl.arange(0, block // 2)
    pair_mask = pair < dim // 2
    table = rotation_ptr + (token * half_head + pair % half_head) * 2
    cos = tl.load(table, mask=pair_mask, other=0.0)
    sin = tl.load(table + 1, mask=pair_mask, other=0.0)
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (block,))
    tl.store(rotated_ptr + token * dim + channel, rotated.to(rotated_ptr.dtype.element_ty), mask=mask)


def _launch(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int, normed_TD: torch.Tensor | None
) -> torch.Tensor:
    x_TD = x_TD.contiguous()
    tokens, dim = x_TD.shape
    rotated_TD = torch.empty_like(x_TD)
    rotation = torch.view_as_real(rope.rotation)
    _norm_rope_kernel[(tokens,)](
        x_TD,
        weight_D,
        rotation,
        rotated_TD if normed_TD is None else normed_TD,
        rotated_TD,
        dim,
        dim // num_heads // 2,
        EPS,
        normed_TD is not None,
        triton.next_power_of_2(dim),
        num_warps=8,
    )
    return rotated_TD.unflatten(-1, (num_heads, -1))


def norm_rope(x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int) -> torch.Tensor:
    """See `layers.NormRope`; two passes over memory instead of twelve."""
    return _launch(x_TD, weight_D, rope, num_heads, None)


def norm_and_rope(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `layers.NormAndRope`."""
    normed_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    rotated_TNK = _launch(x_TD, weight_D, rope, num_heads, normed_TD)
    return normed_TD.unflatten(-1, (num_heads, -1)), rotated_TNK


def linear_gelu(linear: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """See `layers.LinearGelu`; the activation is applied as the product's result leaves the chip."""
    if type(linear) is not torch.nn.Linear:
        return torch.nn.functional.gelu(linear(x_TD), approximate="tanh")
    return torch.ops.aten._addmm_activation(linear.bias, x_TD, linear.weight.t(), use_gelu=True)
