"""Kernels over the heads of a token: both cross attentions, packing for the exchange between ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.fusion.model.operations import KV, TextKV

JOINT_HEAD_DIMS = (16, 32, 64, 128)
"""Head dims that joint_attention can do: sides of the matrix units' tiles."""
_LOG2_E = 1.4426950408889634
_QUERY_BLOCK = 64
_KEY_BLOCK = 64


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
