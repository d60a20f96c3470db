"""The networks of the VAE service, and where their weights are."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from services.vae.model.audio_vae import AudioVae
from services.vae.model.video_vae import VideoVae
from services.vae.model.vocoder import Vocoder
from shared.memory.offload import Component


class Networks:
    """Three components: the video decoder, the video encoder, and sound.

    Each is on the device as a whole or not at all: layers are entered once a step, and would be copied as often.
    """

    def __init__(self, video_vae: VideoVae, audio_vae: AudioVae, vocoder: Vocoder) -> None:
        """
        Args:
            video_vae: on the device, in the precision of its arithmetic.
            audio_vae: on the device, float32.
            vocoder: on the device, float32.
        """
        self.video_vae = video_vae
        self.audio_vae = audio_vae
        self.vocoder = vocoder
        self.device = next(vocoder.parameters()).device
        encoder = nn.ModuleList([video_vae.network.encoder, video_vae.network.quant_conv])
        self._decoder = Component(video_vae.decoder.tensors(), self.device)
        self._encoder = Component(_tensors(encoder), self.device)
        self._sound = Component(_tensors(nn.ModuleList([audio_vae, vocoder])), self.device)

    @property
    def hosted(self) -> bool:
        """True if weights are in host memory, and on the device while they are used only."""
        return self._decoder.hosted

    def place(self, *, hosted: bool) -> None:
        """Move the weights where they shall be between uses.

        Raises:
            OutOfMemory: the host's memory cannot be had or locked.
        """
        for component in (self._decoder, self._encoder, self._sound):
            if hosted:
                component.to_host()
            else:
                component.to_device()

    def decoding(self) -> contextlib.AbstractContextManager[None]:
        """Within, the video decoder can be used."""
        return self._decoder.present()

    def encoding(self) -> contextlib.AbstractContextManager[None]:
        """Within, the video encoder can be used."""
        return self._encoder.present()

    def sounding(self) -> contextlib.AbstractContextManager[None]:
        """Within, audio VAE and vocoder can be used."""
        return self._sound.present()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
