"""Small parts of the towers: rotary positions, time, modulation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.config import AUDIO_ROPE_SCALE

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


class Affine(NamedTuple):
    """What follows a normalisation, each (R, D): with two rows, the first belongs to the clean tokens."""

    scale_RD: torch.Tensor
    shift_RD: torch.Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Affine:
        """The learned one of a LayerNorm."""
        return cls(norm.weight.unsqueeze(0), norm.bias.unsqueeze(0))


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer, each (R, D) float32."""

    shift_RD: torch.Tensor
    scale_RD: torch.Tensor
    gate_RD: torch.Tensor

    @property
    def affine(self) -> Affine:
        """LN(x) * (1 + scale) + shift."""
        return Affine(1 + self.scale_RD, self.shift_RD)


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


class RMSNorm(nn.Module):
    """RMS norm over all D channels with weight; statistics in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        return F.rms_norm(x_TD, self.weight.shape, self.weight, EPS)
