"""Kernels over the channels of a token: residual, norms, rotation, quantization."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.fusion.model.layers import EPS, Affine, Rope
from services.fusion.quantization import FP8, LARGEST, SMALLEST_AMAX

_ROW_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rope_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rotation_ptr,
    normed_ptr,
    rotated_ptr,
    row_stride,
    dim: tl.constexpr,
    head_dim: tl.constexpr,
    eps: tl.constexpr,
    keep_normed: tl.constexpr,
    block: tl.constexpr,
):
    """One token: RMS norm over `dim` channels, then rotation of adjacent pairs by the token's [cos, sin] pairs."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    mask = channel < dim
    x = tl.load(x_ptr + token * row_stride + channel, mask=mask, other=0.0).to(tl.float32)
    turn = tl.load(rotation_ptr + token * head_dim + channel % head_dim, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps) * weight
    if keep_normed:
        tl.store(normed_ptr + token * dim + channel, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    even, odd = tl.split(tl.reshape(normed, (block // 2, 2)))
    cos, sin = tl.split(tl.reshape(turn, (block // 2, 2)))
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (block,))
    tl.store(rotated_ptr + token * dim + channel, rotated.to(rotated_ptr.dtype.element_ty), mask=mask)


def _launch_norm_rope(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int, normed_TD: torch.Tensor | None
) -> torch.Tensor:
    assert x_TD.stride(1) == 1
    tokens, dim = x_TD.shape
    rotated_TD = torch.empty(tokens, dim, dtype=x_TD.dtype, device=x_TD.device)
    _norm_rope_kernel[(tokens,)](
        x_TD,
        weight_D,
        torch.view_as_real(rope.rotation),
        rotated_TD if normed_TD is None else normed_TD,
        rotated_TD,
        x_TD.stride(0),
        dim,
        dim // num_heads,
        EPS,
        normed_TD is not None,
        triton.next_power_of_2(dim),
        num_warps=_ROW_WARPS,
    )
    return rotated_TD.unflatten(-1, (num_heads, -1))


def norm_rope(x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int) -> torch.Tensor:
    """See NormRope; two passes over memory instead of twelve. Rows may lie apart."""
    return _launch_norm_rope(x_TD, weight_D, rope, num_heads, None)


def norm_and_rope(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See NormAndRope."""
    normed_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rotated_TNK = _launch_norm_rope(x_TD, weight_D, rope, num_heads, normed_TD)
    return normed_TD.unflatten(-1, (num_heads, -1)), rotated_TNK


@triton.jit  # type: ignore[untyped-decorator]
def _residual_norms_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    gate_ptr,
    sum_ptr,
    scale1_ptr,
    shift1_ptr,
    out1_ptr,
    scale2_ptr,
    shift2_ptr,
    out2_ptr,
    clean,
    gate_stride,
    stride1,
    stride2,
    dim: tl.constexpr,
    eps: tl.constexpr,
    has_y: tl.constexpr,
    has_gate: tl.constexpr,
    num_norms: tl.constexpr,
    block: tl.constexpr,
):
    """One token: x + gate * y is stored, then normed and stored once for each affine. Strides are 0 for one row."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.where(token < clean, 0, 1)
    channel = tl.arange(0, block)
    mask = channel < dim
    x = tl.load(x_ptr + token * dim + channel, mask=mask, other=0.0).to(tl.float32)
    if has_y:
        y = tl.load(y_ptr + token * dim + channel, mask=mask, other=0.0).to(tl.float32)
        if has_gate:
            y *= tl.load(gate_ptr + row * gate_stride + channel, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * dim + channel, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if num_norms > 0:
        mean = tl.sum(x, axis=0) / dim
        centred = tl.where(mask, x - mean, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
        scale = tl.load(scale1_ptr + row * stride1 + channel, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift1_ptr + row * stride1 + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(out1_ptr + token * dim + channel, (normed * scale + shift).to(out1_ptr.dtype.element_ty), mask=mask)
        if num_norms > 1:
            scale = tl.load(scale2_ptr + row * stride2 + channel, mask=mask, other=0.0).to(tl.float32)
            shift = tl.load(shift2_ptr + row * stride2 + channel, mask=mask, other=0.0).to(tl.float32)
            value = (normed * scale + shift).to(out2_ptr.dtype.element_ty)
            tl.store(out2_ptr + token * dim + channel, value, mask=mask)


def residual_norms(
    x_TD: torch.Tensor, y_TD: torch.Tensor | None, gate_RD: torch.Tensor | None, clean: int, affines: tuple[Affine, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """See ResidualNorms; at most two affines."""
    assert x_TD.is_contiguous() and len(affines) <= 2
    tokens, dim = x_TD.shape
    sum_TD = x_TD if y_TD is None else torch.empty_like(x_TD)
    outs = tuple(torch.empty_like(x_TD) for _ in affines)
    # The kernel wants rows that lie densely.
    rows = [Affine(affine.scale_RD.contiguous(), affine.shift_RD.contiguous()) for affine in affines]
    arguments: list[torch.Tensor] = []
    for index in range(2):
        # A pointer that the kernel leaves alone stands for what is not there.
        arguments += [*rows[index], outs[index]] if index < len(affines) else [x_TD, x_TD, x_TD]
    gate_RD = x_TD if gate_RD is None else gate_RD.contiguous()
    _residual_norms_kernel[(tokens,)](
        x_TD,
        x_TD if y_TD is None else y_TD.contiguous(),
        gate_RD,
        sum_TD,
        *arguments,
        clean,
        _row_stride(gate_RD),
        *(_row_stride(rows[index].scale_RD) if index < len(rows) else 0 for index in range(2)),
        dim,
        EPS,
        y_TD is not None,
        gate_RD is not x_TD,
        len(affines),
        triton.next_power_of_2(dim),
        num_warps=_ROW_WARPS,
    )
    return sum_TD, outs


def _row_stride(values_RD: torch.Tensor) -> int:
    return 0 if len(values_RD) == 1 else values_RD.stride(0)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    values_ptr,
    scale_ptr,
    row_stride,
    dim: tl.constexpr,
    largest: tl.constexpr,
    smallest_amax: tl.constexpr,
    gelu: tl.constexpr,
    block: tl.constexpr,
):
    """One row: GELU (tanh form) if asked for, then scaled so that its largest value is the largest of the type."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    mask = channel < dim
    x = tl.load(x_ptr + token * row_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if gelu:
        # 0.5 x (1 + tanh(u)) = x sigmoid(2u)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), smallest_amax)
    # One division a row: the type keeps too few bits for the rounding of the factor to matter.
    values = x * (largest / amax)
    tl.store(values_ptr + token * dim + channel, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + token, amax / largest)


def _launch_quantize(x_TD: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    assert x_TD.stride(1) == 1
    tokens, dim = x_TD.shape
    values_TD = torch.empty(x_TD.shape, dtype=FP8, device=x_TD.device)
    scale_T1 = torch.empty(tokens, 1, dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(dim)
    _quantize_rows_kernel[(tokens,)](
        x_TD,
        values_TD,
        scale_T1,
        x_TD.stride(0),
        dim,
        LARGEST,
        SMALLEST_AMAX,
        gelu,
        block,
        num_warps=_ROW_WARPS if block <= 4096 else 2 * _ROW_WARPS,
    )
    return values_TD, scale_T1


def quantize_rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See quantization.QuantizeRows."""
    return _launch_quantize(x_TD, gelu=False)


def quantize_gelu_rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of GELU(x)."""
    return _launch_quantize(x_TD, gelu=True)
