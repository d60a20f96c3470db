"""The blocks' operations over some tokens at a time, so that what they take for themselves stays small.

The largest is the hidden layer of the feed-forward: 4.7 times its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from services.fusion.model.operations import KV, Attention, FeedForward, JointAttention, Linears, Ops, TextKV, TowerOps


def chunked(ops: Ops, tokens: int) -> Ops:
    """The same operations over at most `tokens` tokens at once; attention over so many queries and all keys.

    Equal up to rounding, and the same work for towers that have no more tokens. A layer whose weight is held in 8 bits
    may scale it back for every chunk, so chunks should not be much smaller than the weight is wide.

    Args:
        ops: of one rank; what spreads tokens over ranks comes on top of it.
        tokens: at least 1.
    """
    assert tokens >= 1
    return in_turn(Ops(_chunked_tower(ops.video, tokens), _chunked_tower(ops.audio, tokens), ops.together))


def in_turn(ops: Ops) -> Ops:
    """The same operations, one tower after the other: side by side, neither can use memory that the other gave back."""
    return ops._replace(together=_audio_first)


def _audio_first(video: Callable[[], Any], audio: Callable[[], Any]) -> tuple[Any, Any]:
    """Together; the audio tower's keys and values of the video tokens are gone before the video tower begins."""
    audio_result = audio()
    return video(), audio_result


def _chunked_tower(ops: TowerOps, tokens: int) -> TowerOps:
    joint = ops.joint_attention
    return replace(
        ops,
        self_attention=_attention(ops.self_attention, tokens),
        text_attention=_attention(ops.text_attention, tokens),
        other_attention=_attention(ops.other_attention, tokens),
        # Where it is None, others may still replace the two attentions that take its place.
        joint_attention=None if joint is None else _joint_attention(joint, tokens),
        linears=_linears(ops.linears, tokens),
        feed_forward=_feed_forward(ops.feed_forward, tokens),
    )


def _rows(length: int, tokens: int) -> Iterator[slice]:
    for start in range(0, length, tokens):
        yield slice(start, min(start + tokens, length))


def _attention(attend: Attention, tokens: int) -> Attention:
    def call(q_TNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor) -> torch.Tensor:
        if len(q_TNK) <= tokens:
            return attend(q_TNK, k_SNK, v_SNK)
        out_TNK = q_TNK.new_empty(q_TNK.shape)
        for rows in _rows(len(q_TNK), tokens):
            out_TNK[rows] = attend(q_TNK[rows], k_SNK, v_SNK)
        return out_TNK

    return call


def _joint_attention(attend: JointAttention, tokens: int) -> JointAttention:
    def call(q_TNK: torch.Tensor, text: TextKV, rotated_q_TNK: torch.Tensor, other: KV) -> torch.Tensor:
        if len(q_TNK) <= tokens:
            return attend(q_TNK, text, rotated_q_TNK, other)
        out_TNK = q_TNK.new_empty(q_TNK.shape)
        for rows in _rows(len(q_TNK), tokens):
            out_TNK[rows] = attend(q_TNK[rows], text, rotated_q_TNK[rows], other)
        return out_TNK

    return call


def _linears(apply: Linears, tokens: int) -> Linears:
    def call(layers: tuple[nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(x_TD) <= tokens:
            return apply(layers, x_TD)
        # Each in memory of its own: of a joint product, all parts stay as long as one of them does.
        outs = tuple(x_TD.new_empty(len(x_TD), len(_weight(layer))) for layer in layers)
        for rows in _rows(len(x_TD), tokens):
            for out_TO, part in zip(outs, apply(layers, x_TD[rows]), strict=True):
                out_TO[rows] = part
        return outs

    return call


def _feed_forward(apply: FeedForward, tokens: int) -> FeedForward:
    def call(linear_in: nn.Module, linear_out: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
        if len(x_TD) <= tokens:
            return apply(linear_in, linear_out, x_TD)
        out_TD = x_TD.new_empty(len(x_TD), len(_weight(linear_out)))
        for rows in _rows(len(x_TD), tokens):
            out_TD[rows] = apply(linear_in, linear_out, x_TD[rows])
        return out_TD

    return call


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight
