"""Triton kernels that do in one pass over memory what the reference operations do in several.

Statistics, rotation and softmax are in float32; each result is rounded once. See model.operations for the functions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.fusion.fp8 import FP8, LARGEST, SMALLEST_AMAX
from services.fusion.model import operations
from services.fusion.model.layers import EPS, Affine, Rope
from services.fusion.model.operations import KV, TextKV
from services.fusion.packing import joint_rows

JOINT_HEAD_DIMS = (16, 32, 64, 128)
"""Head dims that joint_attention can do: sides of the matrix units' tiles."""
_LOG2_E = 1.4426950408889634
_QUERY_BLOCK = 64
_KEY_BLOCK = 64
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
    rows = [Affine(_rows(affine.scale_RD), _rows(affine.shift_RD)) for affine in affines]
    arguments: list[torch.Tensor] = []
    for index in range(2):
        # A pointer that the kernel leaves alone stands for what is not there.
        arguments += [*rows[index], outs[index]] if index < len(affines) else [x_TD, x_TD, x_TD]
    gate_RD = x_TD if gate_RD is None else _rows(gate_RD)
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


def _rows(values_RD: torch.Tensor) -> torch.Tensor:
    """Rows that lie densely, as the kernel wants scale and shift to."""
    return values_RD.contiguous()


def _row_stride(values_RD: torch.Tensor) -> int:
    return 0 if len(values_RD) == 1 else values_RD.stride(0)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_keys(  # type: ignore[no-untyped-def]
    q,
    k_ptr,
    v_ptr,
    key_stride,
    value_stride,
    scale,
    first_alike,
    log2_alike,
    num_keys: tl.constexpr,
    head_dim: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
):
    """Softmax attention of a tile of queries to the keys of a head; `scale` is log2(e) / sqrt(K).

    Key `first_alike` stands for 2^log2_alike equal ones, and no key after it counts.
    """
    channel = tl.arange(0, head_dim)
    maximum = tl.full((query_block,), float("-inf"), tl.float32)
    total = tl.zeros((query_block,), tl.float32)
    out = tl.zeros((query_block, head_dim), tl.float32)
    for start in range(0, num_keys, key_block):
        key = start + tl.arange(0, key_block)
        there = (key < num_keys) & (key <= first_alike)
        k = tl.load(k_ptr + key[None, :] * key_stride + channel[:, None], mask=there[None, :], other=0.0)
        copies = tl.where(key == first_alike, log2_alike, 0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale + copies[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + key[:, None] * value_stride + channel[None, :], mask=there[:, None], other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        maximum = larger
    return out / total[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _joint_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    rotated_q_ptr,
    text_k_ptr,
    text_v_ptr,
    other_k_ptr,
    other_v_ptr,
    out_ptr,
    num_rows_ptr,
    num_queries,
    text_k_stride,
    text_v_stride,
    other_k_stride,
    other_v_stride,
    scale,
    num_text: tl.constexpr,
    bound: tl.constexpr,
    num_other: tl.constexpr,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
):
    """A tile of queries of one head: attention to the text plus attention of the rotated queries to the other tower."""
    query = tl.program_id(0).to(tl.int64) * query_block + tl.arange(0, query_block)
    head = tl.program_id(1) * head_dim
    channel = tl.arange(0, head_dim)
    mask = (query < num_queries)[:, None]
    place = query[:, None] * (num_heads * head_dim) + head + channel[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    num_rows = tl.load(num_rows_ptr)
    padding = tl.maximum(num_text - num_rows, 1).to(tl.float32)
    out = _attend_keys(
        q,
        text_k_ptr + head,
        text_v_ptr + head,
        text_k_stride,
        text_v_stride,
        scale,
        num_rows,
        tl.log2(padding),
        bound,
        head_dim,
        query_block,
        key_block,
    )
    q = tl.load(rotated_q_ptr + place, mask=mask, other=0.0)
    out += _attend_keys(
        q,
        other_k_ptr + head,
        other_v_ptr + head,
        other_k_stride,
        other_v_stride,
        scale,
        num_other,
        0.0,
        num_other,
        head_dim,
        query_block,
        key_block,
    )
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


def joint_attention(q_TNK: torch.Tensor, text: TextKV, rotated_q_TNK: torch.Tensor, other: KV) -> torch.Tensor:
    """See JointAttention; for many queries and few keys, both sums made on the chip. K is one of JOINT_HEAD_DIMS.

    The rows of padding after a prompt are all alike: one of them is attended to, with the weight of them all.
    """
    tokens, num_heads, head_dim = q_TNK.shape
    keys_and_values = (text.k_LNK, text.v_LNK, *other)
    assert q_TNK.is_contiguous() and rotated_q_TNK.is_contiguous()
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in keys_and_values)
    out_TNK = torch.empty_like(q_TNK)
    text_len = len(text.k_LNK)
    _joint_attention_kernel[(triton.cdiv(tokens, _QUERY_BLOCK), num_heads)](
        q_TNK,
        rotated_q_TNK,
        *keys_and_values,
        out_TNK,
        text.num_rows,
        tokens,
        *(x.stride(0) for x in keys_and_values),
        _LOG2_E / head_dim**0.5,
        text_len,
        min(text.bound + 1, text_len),
        len(other[0]),
        num_heads,
        head_dim,
        _QUERY_BLOCK,
        _KEY_BLOCK,
        num_warps=4,
        num_stages=3,
    )
    return out_TNK


def linears(layers: tuple[torch.nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """See Linears; layers whose weights lie side by side (see services.fusion.packing) are one product."""
    plain = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    weight, bias = joint_rows([layer.weight for layer in plain]), joint_rows([layer.bias for layer in plain])
    if len(plain) < len(layers) or weight is None or bias is None:
        return tuple(layer(x_TD) for layer in layers)
    out_TD = torch.nn.functional.linear(x_TD, weight, bias)
    return out_TD.split([layer.out_features for layer in plain], dim=-1)


def feed_forward(linear_in: torch.nn.Module, linear_out: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """See FeedForward; the activation is applied as the first product's result leaves the chip."""
    if not isinstance(linear_in, torch.nn.Linear):
        return operations.feed_forward(linear_in, linear_out, x_TD)
    hidden = torch.ops.aten._addmm_activation(linear_in.bias, x_TD, linear_in.weight.t(), use_gelu=True)
    return linear_out(hidden)


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
    """See fp8.QuantizeRows."""
    return _launch_quantize(x_TD, gelu=False)


def quantize_gelu_rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of GELU(x)."""
    return _launch_quantize(x_TD, gelu=True)


@triton.jit  # type: ignore[untyped-decorator]
def _pack_heads_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tokens,
    v_stride,
    dim: tl.constexpr,
    part: tl.constexpr,
    block: tl.constexpr,
):
    """One token's q, k or v into (P, T, 3, part), where P * part = dim."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, block)
    mask = channel < dim
    source = q_ptr + token * dim
    if which == 1:
        source = k_ptr + token * dim
    if which == 2:
        source = v_ptr + token * v_stride
    values = tl.load(source + channel, mask=mask)
    place = ((channel // part) * tokens + token) * (3 * part) + which * part + channel % part
    tl.store(out_ptr + place, values, mask=mask)


def pack_heads(q_TNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor, degree: int) -> torch.Tensor:
    """See PackHeads; one pass over memory."""
    tokens, num_heads, head_dim = q_TNK.shape
    dim = num_heads * head_dim
    assert q_TNK.is_contiguous() and k_TNK.is_contiguous() and v_TNK.stride()[1:] == (head_dim, 1)
    out_PT3NK = q_TNK.new_empty(degree, tokens, 3, num_heads // degree, head_dim)
    _pack_heads_kernel[(tokens, 3)](
        q_TNK,
        k_TNK,
        v_TNK,
        out_PT3NK,
        tokens,
        v_TNK.stride(0),
        dim,
        dim // degree,
        triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out_PT3NK


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_heads_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, tokens, dim: tl.constexpr, part: tl.constexpr, block: tl.constexpr
):
    """One token of (P, T, part) into (T, P * part)."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    mask = channel < dim
    values = tl.load(x_ptr + ((channel // part) * tokens + token) * part + channel % part, mask=mask)
    tl.store(out_ptr + token * dim + channel, values, mask=mask)


def unpack_heads(x_PTNK: torch.Tensor) -> torch.Tensor:
    """See UnpackHeads."""
    degree, tokens, heads, head_dim = x_PTNK.shape
    dim = degree * heads * head_dim
    out_TNK = x_PTNK.new_empty(tokens, degree * heads, head_dim)
    _unpack_heads_kernel[(tokens,)](
        x_PTNK.contiguous(), out_TNK, tokens, dim, dim // degree, triton.next_power_of_2(dim), num_warps=4
    )
    return out_TNK
