"""Widths of the fusion model."""

from __future__ import annotations

from dataclasses import dataclass

PATCH_AREA = 4
"""Latent pixels of a video token: the patch is (1, 2, 2)."""
AUDIO_ROPE_SCALE = 0.19676
"""Audio rotary angles are scaled by this so that 157 audio rows span the time of 31 video frames."""


@dataclass(frozen=True)
class FusionConfig:
    """Widths of both towers; they differ in their latent channels alone."""

    dim: int
    """Model width d."""
    ffn_dim: int
    """Width of the feed-forward layers."""
    freq_dim: int
    """Width of the sinusoid of the timestep; even."""
    text_dim: int
    """Width of a prompt row."""
    num_heads: int
    num_layers: int
    """Fused blocks."""
    text_len: int
    """Rows a prompt is zero-padded to."""
    video_channels: int = 48
    audio_channels: int = 20

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} times an even head width")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got {self.freq_dim}")

    @property
    def head_dim(self) -> int:
        """Width of a head, k."""
        return self.dim // self.num_heads

    @property
    def audio_mlp_dim(self) -> int:
        """Hidden width of the audio input's gated convolutions: int(2 * 4d / 3), rounded up to a multiple of 256."""
        return -(-(2 * 4 * self.dim // 3) // 256) * 256


RELEASED = FusionConfig(dim=3072, ffn_dim=14336, freq_dim=256, text_dim=4096, num_heads=24, num_layers=30, text_len=512)
"""Ovi 11B (arXiv 2510.01284)."""
