"""The BigVGAN generator: log mel spectrogram to 16 kHz sound.

Parameter names equal the released checkpoint's, less the weight norm, which is folded at load.

Source: BigVGAN (arXiv 2206.04658); snake: arXiv 2006.08195; anti-aliased activations: StyleGAN3 (arXiv 2106.12423).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

DILATIONS = (1, 3, 5)
FILTER_TAPS = 12
_EDGE_KERNEL = 7
_EPSILON = 1e-9


@dataclass(frozen=True)
class VocoderConfig:
    """Widths and rates of the network; all of them can be read off a weight file."""

    mel_bins: int
    """Bins of the spectrogram."""
    initial_channels: int
    """Channels before the first upsampling; every upsampling halves them."""
    upsample_kernel_sizes: tuple[int, ...]
    """Of the transposed convolutions; each upsamples by half its kernel."""
    resblock_kernel_sizes: tuple[int, ...]
    """Of the parallel residual blocks after each upsampling."""

    @property
    def upsample_rates(self) -> tuple[int, ...]:
        """Samples out for one in, of each upsampling."""
        return tuple(kernel // 2 for kernel in self.upsample_kernel_sizes)

    @property
    def samples_per_frame(self) -> int:
        """Sound samples for one mel frame."""
        return math.prod(self.upsample_rates)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each upsampling."""
        return tuple(self.initial_channels >> (i + 1) for i in range(len(self.upsample_kernel_sizes)))


RELEASED_VOCODER = VocoderConfig(
    mel_bins=80,
    initial_channels=1536,
    upsample_kernel_sizes=(8, 8, 4, 4, 4, 4),
    resblock_kernel_sizes=(3, 7, 11),
)


def anti_alias_filter() -> torch.Tensor:
    """The low-pass (1, 1, 12) of every activation: a Kaiser-windowed sinc of unit sum for resampling by 2.

    Cutoff a quarter and half transition width 0.3 of the doubled rate; the window's beta by Kaiser's formula.
    """
    cutoff, half_width = 0.25, 0.3
    attenuation_db = 2.285 * (FILTER_TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation_db > 50.0:
        beta = 0.1102 * (attenuation_db - 8.7)
    else:
        beta = 0.5842 * (attenuation_db - 21.0) ** 0.4 + 0.07886 * (attenuation_db - 21.0)
    window = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    time = torch.arange(FILTER_TAPS, dtype=torch.float64) - (FILTER_TAPS - 1) / 2
    taps = window * torch.sinc(2 * cutoff * time)
    return (taps / taps.sum()).float().view(1, 1, -1)


class SnakeBeta(nn.Module):
    """x + sin^2(x e^alpha) / e^beta, per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T)."""
        alpha_C1, beta_C1 = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x_BCT + torch.sin(x_BCT * alpha_C1).square() / (beta_C1 + _EPSILON)


class LowPass(nn.Module):
    """Holds a filter under its name in the checkpoint."""

    filter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.zeros(1, 1, FILTER_TAPS))


class UpSample(LowPass):
    """Doubles the rate: zeros between samples, then the low-pass."""

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, 2T)."""
        channels = x_BCT.shape[1]
        edge = FILTER_TAPS // 2 - 1
        padded_BCT = F.pad(x_BCT, (edge, edge), mode="replicate")
        taps = self.filter.expand(channels, 1, -1)
        full_BCT = 2.0 * F.conv_transpose1d(padded_BCT, taps, stride=2, groups=channels)
        crop = 2 * edge + FILTER_TAPS // 2 - 1
        return full_BCT[..., crop:-crop]


class DownSample(nn.Module):
    """Halves the rate: the low-pass, then every second sample."""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, 2T) -> (B, C, T)."""
        channels = x_BCT.shape[1]
        padded_BCT = F.pad(x_BCT, (FILTER_TAPS // 2 - 1, FILTER_TAPS // 2), mode="replicate")
        return F.conv1d(padded_BCT, self.lowpass.filter.expand(channels, 1, -1), stride=2, groups=channels)


class Activation(nn.Module):
    """SnakeBeta at twice the rate, so that the harmonics it makes do not alias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.upsample = UpSample()
        self.downsample = DownSample()

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T)."""
        out_BCT: torch.Tensor = self.downsample(self.act(self.upsample(x_BCT)))
        return out_BCT


class AmpBlock(nn.Module):
    """Three residual pairs of convolutions, the first of each pair dilated (AMP block 1)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in DILATIONS
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in DILATIONS)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(DILATIONS)))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        """(B, C, T) -> (B, C, T)."""
        for i, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            branch_BCT = conv1(self.activations[2 * i](x_BCT))
            x_BCT = x_BCT + conv2(self.activations[2 * i + 1](branch_BCT))
        return x_BCT


class Vocoder(nn.Module):
    """The generator."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        padding = _EDGE_KERNEL // 2
        self.conv_pre = nn.Conv1d(config.mel_bins, config.initial_channels, _EDGE_KERNEL, padding=padding)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        before = config.initial_channels
        for width, kernel, rate in zip(config.widths, config.upsample_kernel_sizes, config.upsample_rates, strict=True):
            up = nn.ConvTranspose1d(before, width, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.Sequential(up))
            self.resblocks.extend(AmpBlock(width, size) for size in config.resblock_kernel_sizes)
            before = width
        self.activation_post = Activation(before)
        self.conv_post = nn.Conv1d(before, 1, _EDGE_KERNEL, padding=padding)

    def forward(self, mel_BMT: torch.Tensor) -> torch.Tensor:
        """Log10 mel (B, mel bins, T) -> sound (B, S = 256 T) in [-1, 1] at 16 kHz."""
        x_BCT = self.conv_pre(mel_BMT)
        parallel = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x_BCT = up(x_BCT)
            blocks = self.resblocks[i * parallel : (i + 1) * parallel]
            x_BCT = torch.stack([block(x_BCT) for block in blocks]).mean(0)
        out_BCT: torch.Tensor = self.conv_post(self.activation_post(x_BCT))
        return out_BCT.tanh()[:, 0]
