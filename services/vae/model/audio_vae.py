"""The audio VAE: mel spectrogram (80 bins) <-> latent (20 channels at half the mel rate), magnitude-preserving.

Parameter names equal the released checkpoint's; the convolutions' weights are normalised once, at load
(`normalised_weight`), not in the forward.

Source: MMAudio (arXiv 2412.15322) appendix; magnitude-preserving layers: EDM2 (arXiv 2312.02696).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

_EPSILON = 1e-4
_SILU_GAIN = 0.596
_BRANCH_WEIGHT = 0.3
_CLAMP = 256.0


@dataclass(frozen=True)
class AudioVaeConfig:
    """Widths of the network; all of them can be read off a weight file."""

    hidden_dim: int
    """Channels of the first level."""
    channel_mult: tuple[int, ...]
    """Channels of each level, in multiples of hidden_dim."""
    num_res_blocks: int
    """Residual blocks of an encoder level; a decoder level has one more."""
    mel_bins: int
    """Bins of the spectrogram."""
    latent_dim: int
    """Channels of the latent."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.hidden_dim * factor for factor in self.channel_mult)


RELEASED_AUDIO_VAE = AudioVaeConfig(
    hidden_dim=384, channel_mult=(1, 2, 4), num_res_blocks=2, mel_bins=80, latent_dim=20
)


def normalised_weight(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight such that every output row has unit gain: w / (1e-4 + ||w_o|| / sqrt(N)) / sqrt(N).

    Args:
        weight: (out, in, kernel); N = in * kernel. The norm is taken in float32.
    """
    size = weight[0].numel()
    norm = weight.float().flatten(1).norm(dim=1).view(-1, 1, 1)
    return (weight.float() / (_EPSILON + norm / math.sqrt(size)) / math.sqrt(size)).to(weight.dtype)


def unit_magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x / (1e-4 + rms over `dim`)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (_EPSILON + norm / math.sqrt(x.shape[dim])).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU that keeps the magnitude of unit-variance input."""
    return F.silu(x) / _SILU_GAIN


def mp_sum(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """0.7 x + 0.3 branch, scaled to keep the magnitude of independent inputs."""
    return torch.lerp(x, branch, _BRANCH_WEIGHT) / math.hypot(1 - _BRANCH_WEIGHT, _BRANCH_WEIGHT)


def _conv(in_dim: int, out_dim: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(in_dim, out_dim, kernel, padding=kernel // 2, bias=False)


class ResBlock(nn.Module):
    """Unit-magnitude input, two convolutions, magnitude-preserving sum."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_dim, out_dim, 3)
        self.conv2 = _conv(out_dim, out_dim, 3)
        self.nin_shortcut = _conv(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, in, T) -> (B, out, T)."""
        x_BCT = unit_magnitude(x_BCT, dim=1)
        branch_BCT = self.conv2(mp_silu(self.conv1(mp_silu(x_BCT))))
        if self.nin_shortcut is not None:
            x_BCT = self.nin_shortcut(x_BCT)
        return mp_sum(x_BCT, branch_BCT)


class AttentionBlock(nn.Module):
    """One head of self-attention over time with unit-magnitude queries, keys and values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = _conv(dim, 3 * dim, 1)
        self.proj_out = _conv(dim, dim, 1)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T)."""
        batch, channels, time = x_BCT.shape
        qkv_BC3T = unit_magnitude(self.qkv(x_BCT).view(batch, channels, 3, time), dim=1)
        q_BTC, k_BTC, v_BTC = qkv_BC3T.permute(2, 0, 3, 1).unbind(0)
        branch_BTC = F.scaled_dot_product_attention(q_BTC[:, None], k_BTC[:, None], v_BTC[:, None])[:, 0]
        return mp_sum(x_BCT, self.proj_out(branch_BTC.transpose(1, 2)))


class Middle(nn.Module):
    """Residual, attention, residual; clamped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(dim, dim)
        self.attn_1 = AttentionBlock(dim)
        self.block_2 = ResBlock(dim, dim)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T)."""
        x_BCT = self.block_2(self.attn_1(self.block_1(x_BCT)))
        return x_BCT.clamp(-_CLAMP, _CLAMP)


class Downsample(nn.Module):
    """Halves time: 1x1 convolution, mean of neighbours, 1x1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = _conv(dim, dim, 1)
        self.conv2 = _conv(dim, dim, 1)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T // 2)."""
        pooled_BCT: torch.Tensor = self.conv2(F.avg_pool1d(self.conv1(x_BCT), 2))
        return pooled_BCT


class Upsample(nn.Module):
    """Doubles time: every position twice, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _conv(dim, dim, 3)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, 2T)."""
        doubled_BCT: torch.Tensor = self.conv(x_BCT.repeat_interleave(2, dim=2))
        return doubled_BCT


class Level(nn.Module):
    """Residual blocks of one width, each clamped; may halve or double time at its end."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_blocks))
        self.downsample = Downsample(out_dim) if down else None
        self.upsample = Upsample(out_dim) if up else None

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, in, T) -> (B, out, T), or T // 2, or 2T."""
        for block in self.block:
            x_BCT = block(x_BCT).clamp(-_CLAMP, _CLAMP)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x_BCT = resample(x_BCT)
        return x_BCT


class Encoder(nn.Module):
    """Normalised mel to the latent's mean and log variance."""

    def __init__(self, config: AudioVaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _conv(config.mel_bins, widths[0], 3)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.num_res_blocks, down=i == 0) for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.conv_out = _conv(widths[-1], 2 * config.latent_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, mel_BMT: torch.Tensor) -> torch.Tensor:
        """(B, mel bins, T) -> (B, 2 * latent_dim, T // 2)."""
        x_BCT = self.conv_in(mel_BMT)
        for level in self.down:
            x_BCT = level(x_BCT)
        out_BCL: torch.Tensor = self.conv_out(mp_silu(self.mid(x_BCT)))
        return out_BCL * (self.learnable_gain + 1)


class Decoder(nn.Module):
    """Latent to normalised mel."""

    def __init__(self, config: AudioVaeConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = _conv(config.latent_dim, widths[-1], 3)
        self.mid = Middle(widths[-1])
        # Doubling time "on entering level 0" is the last thing level 1 does.
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], width, config.num_res_blocks + 1, up=i == 1)
            for i, width in enumerate(widths)
        )
        self.conv_out = _conv(widths[0], config.mel_bins, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, latent_BCL: torch.Tensor) -> torch.Tensor:
        """(B, latent_dim, L) -> (B, mel bins, 2L)."""
        x_BCT = self.mid(self.conv_in(latent_BCL))
        for level in reversed(self.up):
            x_BCT = level(x_BCT)
        out_BMT: torch.Tensor = self.conv_out(mp_silu(x_BCT))
        return out_BMT * (self.learnable_gain + 1)


class AudioVae(nn.Module):
    """Both directions, with the mel's own mean and deviation taken off and put back."""

    data_mean: torch.Tensor
    data_std: torch.Tensor

    def __init__(self, config: AudioVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("data_mean", torch.zeros(1, config.mel_bins, 1))
        self.register_buffer("data_std", torch.ones(1, config.mel_bins, 1))

    def encode(self, mel_BMT: torch.Tensor) -> torch.Tensor:
        """The most likely latent, (B, latent_dim, T // 2), of a log10 mel spectrogram (B, mel bins, T)."""
        moments_BCL: torch.Tensor = self.encoder((mel_BMT - self.data_mean) / self.data_std)
        return moments_BCL[:, : self.config.latent_dim]

    def decode(self, latent_BCL: torch.Tensor) -> torch.Tensor:
        """The log10 mel spectrogram (B, mel bins, 2L) of a latent (B, latent_dim, L)."""
        mel_BMT: torch.Tensor = self.decoder(latent_BCL)
        return mel_BMT * self.data_std + self.data_mean
