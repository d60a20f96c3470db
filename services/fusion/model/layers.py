"""Small parts of the towers: rotary positions, time, modulation, normalised attention inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.config import AUDIO_ROPE_SCALE

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q_TNK, k_SNK, v_SNK) -> o_TNK: unmasked softmax attention with scale K^-0.5."""

NormRope = Callable[[torch.Tensor, torch.Tensor, "Rope", int], torch.Tensor]
"""(x_TD, weight_D, rope, num_heads) -> RMS-normed over D, split into heads, rotated, (T, N, K)."""
NormAndRope = Callable[[torch.Tensor, torch.Tensor, "Rope", int], tuple[torch.Tensor, torch.Tensor]]
"""The same, giving the normed heads both without and with rotation."""
LinearGelu = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""(linear, x) -> GELU(linear(x)), tanh form."""

EPS = 1e-6


class Rope(NamedTuple):
    """Rotation of every token: unit complex numbers (T, 1, K/2), complex64."""

    rotation: torch.Tensor

    def apply(self, x_TNK: torch.Tensor) -> torch.Tensor:
        """Rotate adjacent pairs (2j, 2j+1) of each head in float32."""
        pairs = torch.view_as_complex(x_TNK.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotation).flatten(-2).type_as(x_TNK)


def _axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dims of a head that rotate with time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """positions (P,) float64 -> (P, dim/2): position * 10000^(-2j/dim)."""
    theta = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) if dim else torch.empty(0).double()
    return torch.outer(positions, theta)


def video_rope(frames: int, height: int, width: int, head_dim: int) -> Rope:
    """Rotations of the tokens of a (frames, height, width) grid in that order, on the CPU."""
    dims = _axis_dims(head_dim)
    grid = (frames, height, width)
    parts = []
    for axis in range(3):
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        angles = _angles(torch.arange(grid[axis], dtype=torch.float64), dims[axis])
        parts.append(angles.view(shape).expand(*grid, -1))
    angles_TK = torch.cat(parts, dim=-1).flatten(0, 2)
    return _rope(angles_TK)


def audio_rope(length: int, head_dim: int) -> Rope:
    """Rotations of `length` audio tokens: only the time dims turn, slowed by AUDIO_ROPE_SCALE. On the CPU."""
    time_dim, *_ = _axis_dims(head_dim)
    angles = _angles(torch.arange(length, dtype=torch.float64), time_dim) * AUDIO_ROPE_SCALE
    return _rope(F.pad(angles, (0, head_dim // 2 - angles.shape[1])))


def _rope(angles: torch.Tensor) -> Rope:
    return Rope(torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(1))


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer, each (R, D) float32."""

    shift_RD: torch.Tensor
    scale_RD: torch.Tensor
    gate_RD: torch.Tensor


def _by_row(x_TD: torch.Tensor, rows: int, clean: int) -> tuple[torch.Tensor, ...]:
    """The tokens of each modulation row: with two rows, the first `clean` tokens belong to row 0."""
    return (x_TD,) if rows == 1 else (x_TD[:clean], x_TD[clean:])


def modulated_norm(x_TD: torch.Tensor, shift_RD: torch.Tensor, scale_RD: torch.Tensor, clean: int) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift; LayerNorm without affine of its own, statistics in float32."""
    scale, shift = (1 + scale_RD).type_as(x_TD), shift_RD.type_as(x_TD)
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


class ModulationTable(nn.Module):
    """The learned (1, n, D) part of a modulation; the time row is added to it."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, num, dim))

    def forward(self, time_RnD: torch.Tensor) -> torch.Tensor:
        """(R, n, D), float32."""
        return self.modulation.float() + time_RnD


def sinusoid(timestep: torch.Tensor, freq_dim: int) -> torch.Tensor:
    """(R,) timesteps in 0..1000 -> (R, freq_dim) of [cos | sin], computed in float64, returned in float32."""
    half = freq_dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angles = torch.outer(timestep.double(), 10000.0 ** (-steps / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def linear_fp32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A Linear in float32 whatever its weights are stored in; for the few rows of the time embedding."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def norm_rope(x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int) -> torch.Tensor:
    """Reference of NormRope."""
    return rope.apply(F.rms_norm(x_TD, weight_D.shape, weight_D, EPS).unflatten(-1, (num_heads, -1)))


def norm_and_rope(
    x_TD: torch.Tensor, weight_D: torch.Tensor, rope: Rope, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of NormAndRope."""
    normed_TNK = F.rms_norm(x_TD, weight_D.shape, weight_D, EPS).unflatten(-1, (num_heads, -1))
    return normed_TNK, rope.apply(normed_TNK)


def linear_gelu(linear: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """Reference of LinearGelu."""
    return F.gelu(linear(x_TD), approximate="tanh")


@dataclass(frozen=True)
class TowerOps:
    """The operations of a tower that have several implementations of one function; chosen from outside."""

    self_attention: Attention
    text_attention: Attention
    other_attention: Attention
    """To the tokens of the other tower."""
    norm_rope: NormRope = norm_rope
    norm_and_rope: NormAndRope = norm_and_rope
    linear_gelu: LinearGelu = linear_gelu


class Ops(NamedTuple):
    """The operations of both towers."""

    video: TowerOps
    audio: TowerOps

    @classmethod
    def of(cls, attention: Attention) -> Ops:
        """One attention everywhere, the reference of everything else."""
        tower = TowerOps(attention, attention, attention)
        return cls(tower, tower)


class RMSNorm(nn.Module):
    """RMS norm over all D channels with weight; statistics in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        return F.rms_norm(x_TD, self.weight.shape, self.weight, EPS)
