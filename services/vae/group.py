"""The VAE service on several ranks: rank 0 leads and does everything else, all of them decode pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from services.vae.config import VaeOptions
from services.vae.decoding import PictureSource
from services.vae.engine import VaeEngine, load_decoding
from services.vae.memory import VaeMemory
from services.vae.model.video_vae import VideoVae
from services.vae.parallel import connect_ranks, decode_striped
from shared.group.control import Command, ControlChannel
from shared.group.ranks import Fellowship, join_group
from shared.group.steps import follow, follow_steps, lead, load_together
from shared.memory.modes import VramMode

_DECODE = "decode"
_PER_STEP = "latent_frames_per_step"
_WHAT = "the VAE"


def join_decoders(options: VaeOptions) -> Fellowship:
    """Meet the other ranks; all of them call it once."""
    fellowship = join_group(options.ranks, options.stage.device)
    connect_ranks(options.stage.device)
    return fellowship


def load_leader(options: VaeOptions, memory: VaeMemory, mode: VramMode, fellowship: Fellowship) -> VaeEngine:
    """The engine of rank 0, whose pictures are decoded by all ranks; see `VaeEngine.load`.

    Raises:
        CheckpointError: a file could not be loaded, here or on another rank.
    """
    channel = fellowship.channel

    def load() -> VaeEngine:
        return VaeEngine.load(options, memory, mode, lambda vae: led_pictures(vae, channel))

    return load_together(load, _WHAT, channel)


def run_follower(options: VaeOptions, fellowship: Fellowship) -> None:
    """Every rank but 0: decode stripes as rank 0 says, until it says stop.

    Raises:
        CheckpointError: a file could not be loaded, here or on another rank.
        RuntimeError: rank 0 is gone, or a collective failed; the process should end.
    """
    channel = fellowship.channel
    VaeMemory.of(options)  # keeps this process to its limit
    vae = load_together(lambda: load_decoding(options), _WHAT, channel)
    follow(fellowship, {_DECODE: lambda command: decode_as_told(vae, command, channel)})


def led_pictures(vae: VideoVae, channel: ControlChannel) -> PictureSource:
    """On rank 0: pictures of which every rank decodes its rows."""

    def pictures(latent_CFHW: torch.Tensor, latent_frames_per_step: int) -> Iterator[torch.Tensor]:
        command = Command(_DECODE, {_PER_STEP: latent_frames_per_step}, {"latent_CFHW": latent_CFHW})
        return lead(channel, command, decode_striped(vae, latent_CFHW, latent_frames_per_step))

    return pictures


def decode_as_told(vae: VideoVae, command: Command, channel: ControlChannel) -> None:
    """On the other ranks: this rank's rows of the latent in a command of rank 0."""
    latent_CFHW = command.tensors["latent_CFHW"]
    assert latent_CFHW is not None
    latent_CFHW = latent_CFHW.to(vae.mean_C111.device)
    follow_steps(channel, decode_striped(vae, latent_CFHW, command.fields[_PER_STEP]))
