"""Options of the VAE service."""

from __future__ import annotations

from dataclasses import dataclass

from services.vae.ops import Kernels
from shared.group.ranks import Ranks
from shared.service_main import StageOptions
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE

WEIGHT_FILES = (VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE)
"""What the service loads, below the checkpoint folder."""


@dataclass(frozen=True)
class VaeOptions:
    """Flags of the VAE service, resolved."""

    stage: StageOptions
    chunk_latent_frames: int
    """Latent frames whose pictures are copied to the host, encoded and reported together.

    It changes neither the frames nor the speed of the network; more means fewer hand-overs, but more memory and a
    later stop on cancel.
    """
    kernels: Kernels
    """Implementations of the video decoder's operations."""
    ranks: Ranks
    """This process among those that decode a clip together."""
