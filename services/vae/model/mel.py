"""Sound to log mel spectrogram, as the audio VAE was trained on it.

16 kHz, 1024-point FFT, hop 256, periodic Hann window, 80 Slaney mels from 0 to 8000 Hz, log10.
Mel scale: Slaney, Auditory Toolbox (1998): linear below 1 kHz, logarithmic above; filters of unit area.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from shared.shapes import SAMPLE_RATE_HZ

N_FFT = 1024
HOP = 256
MAX_HZ = 8000.0
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0
_MAGNITUDE_FLOOR = 1e-9
_LOG_FLOOR = 1e-5


def _mel_to_hz(mel: torch.Tensor) -> torch.Tensor:
    above = _BREAK_HZ * torch.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return torch.where(mel < _BREAK_MEL, mel * _LINEAR_HZ_PER_MEL, above)


def mel_filters(mel_bins: int) -> torch.Tensor:
    """Triangular filters (mel_bins, 513), float32, each of unit area in Hz."""
    top_mel = _BREAK_MEL + math.log(MAX_HZ / _BREAK_HZ) / _LOG_STEP
    edges_hz = _mel_to_hz(torch.linspace(0.0, top_mel, mel_bins + 2, dtype=torch.float64))
    bins_hz = torch.linspace(0.0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1, dtype=torch.float64)
    left, centre, right = (edges_hz[i : mel_bins + i, None] for i in range(3))
    rising = (bins_hz - left) / (centre - left)
    falling = (right - bins_hz) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0.0) * 2.0 / (right - left)).float()


class MelSpectrogram(nn.Module):
    """The front end; constants only, nothing to load."""

    filters_MK: torch.Tensor
    window: torch.Tensor

    def __init__(self, mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("filters_MK", mel_filters(mel_bins), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waveform_BS: torch.Tensor) -> torch.Tensor:
        """Sound (B, S) in [-1, 1] at 16 kHz -> (B, mel bins, S // 256), log10, at least -5. S is above 384."""
        padded_BS = F.pad(waveform_BS[:, None], ((N_FFT - HOP) // 2,) * 2, mode="reflect")[:, 0]
        spectrum_BKT = torch.stft(padded_BS, N_FFT, HOP, window=self.window, center=False, return_complex=True)
        magnitude_BKT = torch.view_as_real(spectrum_BKT).square().sum(-1).add(_MAGNITUDE_FLOOR).sqrt()
        return (self.filters_MK @ magnitude_BKT).clamp(min=_LOG_FLOOR).log10()
