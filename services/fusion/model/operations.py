"""The operations of a block that have several implementations of one function, and their plain PyTorch references.

Better implementations are injected from outside, see services.fusion.ops. T tokens, S tokens of the other tower,
D width, N heads, K head dim, R modulation rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.layers import EPS, Affine, Rope

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q_TNK, k_SNK, v_SNK) -> o_TNK: unmasked softmax attention with scale K^-0.5."""


class TextKV(NamedTuple):
    """Keys and values of the prompt for one block of one tower; the same for every step of a job."""

    k_LNK: torch.Tensor
    v_LNK: torch.Tensor
    num_rows: torch.Tensor
    """Rows of the prompt, int32 scalar on the device; the rows after them are padding, and so all alike."""
    bound: int
    """At least num_rows and the same for prompts of similar length, so that work can be laid out for it."""


KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, (S, N, K) each."""
JointAttention = Callable[[torch.Tensor, TextKV, torch.Tensor, KV], torch.Tensor]
"""(q_TNK, text, rotated_q_TNK, other) -> attention of q to text + attention of rotated q to other, (T, N, K)."""
NormRope = Callable[[torch.Tensor, torch.Tensor, Rope, int], torch.Tensor]
"""(x_TD, weight_D, rope, num_heads) -> RMS-normed over D, split into heads, rotated, (T, N, K)."""
NormAndRope = Callable[[torch.Tensor, torch.Tensor, Rope, int], tuple[torch.Tensor, torch.Tensor]]
"""The same, giving the normed heads both without and with rotation."""
ResidualNorms = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, tuple[Affine, ...]],
    tuple[torch.Tensor, tuple[torch.Tensor, ...]],
]
"""(x_TD, y_TD, gate_RD, clean, affines) -> x + gate * y, and its LayerNorm followed by each affine.

No y: x as it is. No gate: x + y. With two rows, the first `clean` tokens belong to row 0.
"""
Linears = Callable[[tuple[nn.Module, ...], torch.Tensor], tuple[torch.Tensor, ...]]
"""(linear layers, x_TD) -> what each makes of x."""
PackHeads = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(q_TNK, k_TNK, v_TNK, P) -> (P, T, 3, N/P, K): what each of P ranks gets when tokens are traded for heads."""
UnpackHeads = Callable[[torch.Tensor], torch.Tensor]
"""(P, T, N, K) -> (T, P N, K): the heads that came back from P ranks."""
FeedForward = Callable[[nn.Module, nn.Module, torch.Tensor], torch.Tensor]
"""(linear in, linear out, x_TD) -> out(GELU(in(x))), tanh form."""
Together = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]
"""Results of two pieces of work that do not depend on each other."""


def _by_row(x_TD: torch.Tensor, rows: int, clean: int) -> tuple[torch.Tensor, ...]:
    """The tokens of each modulation row."""
    return (x_TD,) if rows == 1 else (x_TD[:clean], x_TD[clean:])


def affine_norm(x_TD: torch.Tensor, affine: Affine, clean: int) -> torch.Tensor:
    """LN(x) * scale + shift; LayerNorm without affine of its own, statistics in float32."""
    scale, shift = affine.scale_RD.type_as(x_TD), affine.shift_RD.type_as(x_TD)
    parts = [
        F.layer_norm(part, x_TD.shape[-1:], scale[row], shift[row], EPS)
        for row, part in enumerate(_by_row(x_TD, len(scale), clean))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_gated(x_TD: torch.Tensor, y_TD: torch.Tensor, gate_RD: torch.Tensor, clean: int) -> torch.Tensor:
    """x + gate * y, rounded once."""
    out_TD = torch.empty_like(x_TD)
    gate = gate_RD.type_as(x_TD)
    split = (_by_row(tensor, len(gate), clean) for tensor in (x_TD, y_TD, out_TD))
    for row, (x, y, out) in enumerate(zip(*split, strict=True)):
        torch.addcmul(x, y, gate[row], out=out)
    return out_TD


def residual_norms(
    x_TD: torch.Tensor, y_TD: torch.Tensor | None, gate_RD: torch.Tensor | None, clean: int, affines: tuple[Affine, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Reference of ResidualNorms."""
    if y_TD is not None:
        x_TD = x_TD + y_TD if gate_RD is None else add_gated(x_TD, y_TD, gate_RD, clean)
    return x_TD, tuple(affine_norm(x_TD, affine, clean) for affine in affines)


def norm_rope(x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int) -> torch.Tensor:
    """Reference of NormRope."""
    return rope.apply(F.rms_norm(x_TD, weight_D.shape, weight_D, EPS).unflatten(-1, (num_heads, -1)))


def norm_and_rope(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of NormAndRope."""
    normed_TNK = F.rms_norm(x_TD, weight_D.shape, weight_D, EPS).unflatten(-1, (num_heads, -1))
    return normed_TNK, rope.apply(normed_TNK)


def linears(layers: tuple[nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Reference of Linears."""
    return tuple(layer(x_TD) for layer in layers)


def pack_heads(q_TNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor, degree: int) -> torch.Tensor:
    """Reference of PackHeads."""
    stacked_TP3NK = torch.stack([x.unflatten(1, (degree, -1)) for x in (q_TNK, k_TNK, v_TNK)], dim=2)
    return stacked_TP3NK.transpose(0, 1).contiguous()


def unpack_heads(x_PTNK: torch.Tensor) -> torch.Tensor:
    """Reference of UnpackHeads."""
    return x_PTNK.transpose(0, 1).flatten(1, 2)


def feed_forward(linear_in: nn.Module, linear_out: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """Reference of FeedForward."""
    return linear_out(F.gelu(linear_in(x_TD), approximate="tanh"))


def in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Reference of Together."""
    return first(), second()


@dataclass(frozen=True)
class TowerOps:
    """The operations of a tower."""

    self_attention: Attention
    text_attention: Attention
    other_attention: Attention
    """To the tokens of the other tower."""
    joint_attention: JointAttention | None = None
    """Does the work of both text_attention and other_attention; None: those two and a sum."""
    norm_rope: NormRope = norm_rope
    norm_and_rope: NormAndRope = norm_and_rope
    residual_norms: ResidualNorms = residual_norms
    linears: Linears = linears
    feed_forward: FeedForward = feed_forward
    pack_heads: PackHeads = pack_heads
    unpack_heads: UnpackHeads = unpack_heads

    def attend_jointly(self, q_TNK: torch.Tensor, text: TextKV, rotated_q_TNK: torch.Tensor, other: KV) -> torch.Tensor:
        """See JointAttention."""
        if self.joint_attention is not None:
            return self.joint_attention(q_TNK, text, rotated_q_TNK, other)
        return self.text_attention(q_TNK, text.k_LNK, text.v_LNK) + self.other_attention(rotated_q_TNK, *other)


class Ops(NamedTuple):
    """The operations of both towers."""

    video: TowerOps
    audio: TowerOps
    together: Together = in_turn
    """What the towers do at the same time: work of the video tower, work of the audio tower."""

    @classmethod
    def of(cls, attention: Attention) -> Ops:
        """One attention everywhere, the reference of everything else."""
        tower = TowerOps(attention, attention, attention)
        return cls(tower, tower)
