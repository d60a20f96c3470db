"""Pictures of a latent, in whatever layout the memory allows; they are the same in all of them, up to rounding."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

import torch

from services.vae.memory import VaeMemory
from services.vae.model.video_layers import Window
from services.vae.model.video_vae import VideoVae
from services.vae.tiles import cut_tiles, decode_tiled
from shared.device_memory import freed
from shared.logging import get_logger
from shared.memory.estimate import VaeLayout
from shared.shapes import VideoLatentShape

log = get_logger(__name__)

PictureSource = Callable[[torch.Tensor, int], Iterator[torch.Tensor]]
"""From a normalised latent (48, F, h, w) to its pictures (f, 16h, 16w, 3), levels 0 to 255, on the device; so many
latent frames at a time."""


class PictureDecoder:
    """A video VAE that decodes on one device."""

    def __init__(
        self, vae: VideoVae, device: torch.device, memory: VaeMemory, pictures: PictureSource | None = None
    ) -> None:
        """
        Args:
            vae: whose decoder is on the device when it is used.
            device: where it runs.
            memory: knows the next smaller layout.
            pictures: how it decodes whole pictures, if not alone.
        """
        self._vae = vae
        self._device = device
        self._memory = memory
        self._pictures = pictures
        self.part_done = 0.0
        """Of the present clip, 0 to 1, where pictures come only as the work ends; 0 where they come all the time."""

    def decode(self, latent_CFHW: torch.Tensor, layout: VaeLayout) -> Iterator[torch.Tensor]:
        """Levels (f, 16H, 16W, 3) in host memory, step by step; there are steps without any.

        If memory runs out, the clip is begun again, once, in the next smaller layout.

        Raises:
            torch.OutOfMemoryError: that did not do, or there is none.
        """
        given, self.part_done = 0, 0.0
        smaller = self._memory.smaller(layout, VideoLatentShape(*latent_CFHW.shape[1:]))
        try:
            for levels_FHWC in self._decode_in(layout, latent_CFHW):
                given += len(levels_FHWC)
                yield levels_FHWC
            return
        except torch.OutOfMemoryError as error:
            if smaller is None:
                raise
            reason = let_go(error)
        freed(self._device)
        log.warning("memory ran out; the clip is begun again", layout=layout, smaller=smaller, reason=reason)
        seen = 0
        for levels_FHWC in self._decode_in(smaller, latent_CFHW):
            yield levels_FHWC[max(0, given - seen) :]
            seen += len(levels_FHWC)

    def _decode_in(self, layout: VaeLayout, latent_CFHW: torch.Tensor) -> Iterator[torch.Tensor]:
        per_step = min(layout.latent_frames_per_step, self._vae.decoder.ops.latent_frames_per_step)
        if layout.tile_latent_side is None:
            return self._on_host(self._whole(latent_CFHW, per_step))

        def decode(window: Window) -> Iterator[torch.Tensor]:
            return self._on_host(
                self._vae.decode(latent_CFHW, torch.uint8, window=window, latent_frames_per_step=per_step)
            )

        shape = VideoLatentShape(*latent_CFHW.shape[1:])
        tiles = cut_tiles(shape.height, shape.width, layout.tile_latent_side, self._vae.decoder.reach)
        return decode_tiled(decode, tiles, shape, self._report)

    def _report(self, part_done: float) -> None:
        self.part_done = max(self.part_done, part_done)

    def _whole(self, latent_CFHW: torch.Tensor, per_step: int) -> Iterator[torch.Tensor]:
        if self._pictures is not None:
            return self._pictures(latent_CFHW, per_step)
        return self._vae.decode(latent_CFHW, torch.uint8, latent_frames_per_step=per_step)

    def _on_host(self, pictures: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        return _copied_to_host(pictures, self._device) if self._device.type == "cuda" else pictures


def let_go(error: torch.OutOfMemoryError) -> str:
    """Why memory ran out, in the allocator's words. What the frames of the error hold would live as long as it does."""
    traceback.clear_frames(error.__traceback__)
    return str(error).splitlines()[0]


def _copied_to_host(pictures: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The same on the host. While one is copied, the device works at the next."""
    copies = torch.cuda.Stream(device)
    ahead: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for levels_FHWC in pictures:
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            host_FHWC = torch.empty(levels_FHWC.shape, dtype=levels_FHWC.dtype, pin_memory=True)
            host_FHWC.copy_(levels_FHWC, non_blocking=True)
            levels_FHWC.record_stream(copies)
            copied = copies.record_event()
        if ahead is not None:
            ahead[1].synchronize()
            yield ahead[0]
        ahead = host_FHWC, copied
    if ahead is not None:
        ahead[1].synchronize()
        yield ahead[0]
