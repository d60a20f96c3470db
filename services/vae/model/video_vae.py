"""The Wan2.2 video VAE: diffusers' encoder, and our decoder over the same weights.

Source: Wan (arXiv 2503.20314) section 4; strides 16x16x4, 48 channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from services.vae.model.video_decoder import VideoDecoder
from services.vae.model.video_layers import PIXEL_CHANNELS, Stripe, Window

# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class VideoVaeConfig:
    """Widths of the network; all of them can be read off a weight file."""

    base_dim: int
    """Channels of the encoder's first level."""
    decoder_base_dim: int
    """Channels of the decoder's last level."""
    z_dim: int
    """Channels of the latent."""
    dim_mult: tuple[int, ...]
    """Channels of each level, in multiples of the base."""
    num_res_blocks: int
    """Residual blocks of an encoder level; a decoder level has one more."""
    temporal_downsample: tuple[bool, ...]
    """Whether time is halved after each level but the last."""
    patch_size: int
    """Side of the pixel squares that are folded into channels."""

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent position, along each side."""
        return int(self.patch_size * 2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Frames a latent frame, after the first."""
        return int(2 ** sum(self.temporal_downsample))


RELEASED_VIDEO_VAE = VideoVaeConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    patch_size=2,
)


def wan_network(config: VideoVaeConfig) -> nn.Module:
    """diffusers' network in its Wan2.2 form, with whatever weights it is born with.

    Raises:
        ValueError: widths that do not divide as the shortcuts need.
    """
    channels = PIXEL_CHANNELS * config.patch_size**2
    network: nn.Module = AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.decoder_base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        attn_scales=[],
        temperal_downsample=list(config.temporal_downsample),
        is_residual=True,
        in_channels=channels,
        out_channels=channels,
        patch_size=config.patch_size,
        scale_factor_temporal=config.temporal_stride,
        scale_factor_spatial=config.spatial_stride,
    )
    return network


class VideoVae(nn.Module):
    """Pixels in [-1, 1] to normalised latents and back. Latents are float32 outside, the networks' dtype inside."""

    network: Any  # an AutoencoderKLWan; diffusers has no types
    mean_C111: torch.Tensor
    std_C111: torch.Tensor

    def __init__(
        self,
        config: VideoVaeConfig,
        network: nn.Module,
        decoder: VideoDecoder,
        *,
        latent_mean: Sequence[float] = LATENT_MEAN,
        latent_std: Sequence[float] = LATENT_STD,
    ) -> None:
        """
        Args:
            config: what `network` was built from.
            network: from `wan_network`; its encoder is run.
            decoder: made of the same weights.
            latent_mean: of each latent channel.
            latent_std: of each latent channel.
        """
        super().__init__()
        self.config = config
        self.network = network
        self.decoder = decoder
        device = next(network.parameters()).device
        for name, values in (("mean_C111", latent_mean), ("std_C111", latent_std)):
            column = torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the networks."""
        return next(self.network.parameters()).dtype

    def encode(self, video_BCFHW: torch.Tensor) -> torch.Tensor:
        """The most likely latent, (B, z_dim, (F-1)//4+1, H/16, W/16) float32, of F frames of pixels in [-1, 1].

        F is 1 (a picture) or 1 more than a multiple of 4; H and W are multiples of 16.
        """
        posterior = self.network.encode(video_BCFHW.to(self.dtype), return_dict=False)[0]
        mean_BCFHW: torch.Tensor = posterior.mode().float()
        return (mean_BCFHW - self.mean_C111) / self.std_C111

    def decode(
        self,
        latent_CFHW: torch.Tensor,
        dtype: torch.dtype,
        stripe: Stripe | None = None,
        *,
        window: Window | None = None,
        latent_frames_per_step: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Pictures (f, 16H, 16W, 3), as many at a time as the decoder makes together; see `VideoDecoder.stream`.

        Memory does not grow with the length of the video.

        Args:
            latent_CFHW: normalised.
            dtype: of the pictures: torch.uint8 for levels 0 to 255, else values in [-1, 1].
            stripe: which rows `latent_CFHW` holds, if not the whole picture.
            window: part of the picture to make, if not all of it.
            latent_frames_per_step: if not that of the operations.
        """
        latent_CFHW = (latent_CFHW.float() * self.std_C111 + self.mean_C111).to(self.dtype)
        latent_FHWC = latent_CFHW.permute(1, 2, 3, 0).contiguous()
        return self.decoder.stream(
            latent_FHWC, dtype, stripe, window=window, latent_frames_per_step=latent_frames_per_step
        )

    def regroup(self, pictures: Iterable[torch.Tensor], chunk_latent_frames: int) -> Iterator[torch.Tensor]:
        """The same pictures (f, ...), those of `chunk_latent_frames` latent frames at a time, the last fewer.

        Empty ones are handed on, so that whoever waits for pictures sees that there is progress.
        """
        every = chunk_latent_frames * self.config.temporal_stride
        missing = every - self.config.temporal_stride + 1
        held: list[torch.Tensor] = []
        for piece in pictures:
            if not len(piece):
                yield piece
            while len(piece):
                held.append(piece[:missing])
                piece = piece[missing:]
                missing -= len(held[-1])
                if missing == 0:
                    yield held[0] if len(held) == 1 else torch.cat(held)
                    held.clear()
                    missing = every
        if held:
            yield torch.cat(held)
