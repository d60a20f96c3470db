"""The VAE stage's work: pictures to latents, latents to frames, sound and clips. Knows no gRPC.

Everything here that touches the networks runs on the device thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from services.vae.config import WEIGHT_FILES, VaeOptions
from services.vae.model.audio_vae import AudioVae
from services.vae.model.video_vae import VideoVae
from services.vae.model.vocoder import Vocoder
from services.vae.mp4 import ClipWriter, num_clip_samples
from services.vae.ops import select_ops
from shared.checkpoints import file_fingerprint
from shared.device_memory import peak_gib, reset_peak
from shared.errors import DiskFull
from shared.logging import get_logger
from shared.shapes import AUDIO_LATENT_CHANNELS, VIDEO_LATENT_CHANNELS, VideoLatentShape
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE

log = get_logger(__name__)

_WARM_UP_SHAPE = (3, 44, 44)
"""Latent frames, rows and columns: one step of the network of each length that it makes."""

PictureSource = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""From a normalised latent (48, F, h, w) to its pictures (f, 16h, 16w, 3), levels 0 to 255, on the device."""


@dataclass(frozen=True)
class ClipProgress:
    """So many frames are in the file."""

    frames_done: int
    frames_total: int


@dataclass(frozen=True)
class ClipWritten:
    """The file is complete."""

    num_frames: int
    height: int
    width: int
    num_samples: int


class VaeEngine:
    """The three networks on one device."""

    def __init__(
        self,
        video_vae: VideoVae,
        audio_vae: AudioVae,
        vocoder: Vocoder,
        *,
        chunk_latent_frames: int,
        fingerprint: str,
        pictures: PictureSource | None = None,
    ) -> None:
        """
        Args:
            video_vae: on the device, in the precision of its arithmetic.
            audio_vae: on the device, float32.
            vocoder: on the device, float32.
            chunk_latent_frames: latent frames whose pictures are handed over together; see VaeOptions.
            fingerprint: of the weight files.
            pictures: how `video_vae` decodes, if not alone.
        """
        self._video_vae = video_vae
        self._pictures = pictures or (lambda latent_CFHW: video_vae.decode(latent_CFHW, torch.uint8))
        self._audio_vae = audio_vae
        self._vocoder = vocoder
        self._device = next(vocoder.parameters()).device
        self._chunk_latent_frames = chunk_latent_frames
        self.fingerprint = fingerprint

    @property
    def peak_device_gib(self) -> float | None:
        """Most GiB reserved since the last clip was begun; None on a CPU."""
        return peak_gib(self._device)

    @classmethod
    def load(cls, options: VaeOptions, spread: Callable[[VideoVae], PictureSource] | None = None) -> VaeEngine:
        """Read the three weight files onto the device.

        Args:
            options: flags of the service.
            spread: makes the video VAE's decoding that of several ranks; None: it decodes alone.

        Raises:
            CheckpointError: one is missing, damaged or does not fit; names the file.
        """
        stage = options.stage
        digest = hashlib.sha256("".join(file_fingerprint(stage.checkpoints / file) for file in WEIGHT_FILES).encode())
        video_vae = load_decoding(options)
        return cls(
            video_vae,
            load_audio_vae(stage.checkpoints / AUDIO_VAE_FILE, stage.device),
            load_vocoder(stage.checkpoints / VOCODER_FILE, stage.device),
            chunk_latent_frames=options.chunk_latent_frames,
            fingerprint=digest.hexdigest()[:16],
            pictures=None if spread is None else spread(video_vae),
        )

    def warm_up(self) -> None:
        """Decode a moment of picture and sound, so that no clip waits for kernels to be compiled; on CUDA only."""
        if self._device.type != "cuda":
            return
        start = time.perf_counter()
        for _ in self.decode_video(torch.zeros(VIDEO_LATENT_CHANNELS, *_WARM_UP_SHAPE)):
            pass
        self.decode_audio(torch.zeros(16, AUDIO_LATENT_CHANNELS))
        log.info("warmed up", seconds=round(time.perf_counter() - start, 3))

    def encode_image(self, frame_HWC: NDArray[np.uint8]) -> torch.Tensor:
        """The normalised latent (48, 1, H/16, W/16), float32 on the CPU, of one RGB frame; see `cover_frame`."""
        pixels_HWC = torch.from_numpy(frame_HWC).to(self._device)
        pixels_BCFHW = pixels_HWC.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1.0
        return self._video_vae.encode(pixels_BCFHW)[0].cpu()

    def decode_video(self, latent_CFHW: torch.Tensor) -> Iterator[NDArray[np.uint8]]:
        """RGB frames (f, 16H, 16W, 3) of a normalised latent, chunk by chunk, on the host."""
        pictures = self._pictures(latent_CFHW.to(self._device))
        if self._device.type == "cuda":
            pictures = _copied_to_host(pictures, self._device)
        for levels_FHWC in self._video_vae.regroup(pictures, self._chunk_latent_frames):
            yield levels_FHWC.numpy()

    def decode_audio(self, latent_SC: torch.Tensor) -> NDArray[np.float32]:
        """Mono samples in [-1, 1] at 16 kHz, 512 for each row of a latent (S, 20)."""
        latent_BCL = latent_SC.to(self._device, torch.float32).T[None]
        samples: NDArray[np.float32] = self._vocoder(self._audio_vae.decode(latent_BCL))[0].cpu().numpy()
        return samples

    def spool_video(self, latent_CFHW: torch.Tensor, file: BinaryIO) -> Iterator[int]:
        """Append raw frames to `file`; yields the bytes readable so far after each chunk.

        A file stands between the device and the client, so that a slow client holds up neither device nor memory.

        Raises:
            DiskFull: the disk is full.
        """
        size = 0
        for frames_FHWC in self.decode_video(latent_CFHW):
            with _disk_full_is_exhaustion():
                size += file.write(frames_FHWC.data)
                file.flush()
            yield size

    def decode_clip(
        self, video_CFHW: torch.Tensor, audio_SC: torch.Tensor, provenance: Mapping[str, str], path: Path
    ) -> Iterator[ClipProgress | ClipWritten]:
        """Write the clip of both latents to `path`; progress after each chunk, then ClipWritten.

        Sound is decoded at the same time as the pictures, on a thread and a stream of its own, and a chunk is encoded
        on another thread while the device works at the next. Sound is cut or padded with silence to the length of the
        video.

        Raises:
            DiskFull: the disk is full.
        """
        reset_peak(self._device)
        shape = VideoLatentShape(*video_CFHW.shape[1:])
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disk_full_is_exhaustion())
            sound_thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sound"))
            sound = sound_thread.submit(self._decode_sound, audio_SC, num_clip_samples(shape.num_frames))
            writer = stack.enter_context(
                ClipWriter(path, height=shape.pixel_height, width=shape.pixel_width, provenance=provenance)
            )
            encoder = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="mp4"))
            encoding: Future[None] | None = None
            for frames_FHWC in self.decode_video(video_CFHW):
                if encoding is not None:
                    encoding.result()
                    yield ClipProgress(writer.num_frames, shape.num_frames)
                encoding = encoder.submit(_add_chunk, writer, frames_FHWC, sound)
            if encoding is not None:
                encoding.result()
            writer.add_samples(sound.result()[writer.num_samples :])
        yield ClipProgress(writer.num_frames, shape.num_frames)
        yield ClipWritten(writer.num_frames, shape.pixel_height, shape.pixel_width, writer.num_samples)

    def _decode_sound(self, audio_SC: torch.Tensor, num_samples: int) -> NDArray[np.float32]:
        if self._device.type != "cuda":
            return fit_length(self.decode_audio(audio_SC), num_samples)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return fit_length(self.decode_audio(audio_SC), num_samples)


def load_decoding(options: VaeOptions) -> VideoVae:
    """The video VAE on the device, with the operations that the flags ask for.

    Raises:
        CheckpointError: see `load_video_vae`.
    """
    stage = options.stage
    # cuDNN would otherwise run float32 convolutions in TF32, which is audible in the vocoder's quiet passages.
    torch.backends.cudnn.allow_tf32 = False
    ops = select_ops(stage.device, options.kernels)
    return load_video_vae(stage.checkpoints / VIDEO_VAE_FILE, stage.device, stage.precision, ops=ops)


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


def _add_chunk(writer: ClipWriter, frames_FHWC: NDArray[np.uint8], sound: Future[NDArray[np.float32]]) -> None:
    """Encode frames, then, as soon as there is sound, what of it belongs to them.

    The muxer holds encoded frames back until their sound has come, so pictures never wait for it.
    """
    writer.add_frames(frames_FHWC)
    if sound.done():
        writer.add_samples(sound.result()[writer.num_samples : num_clip_samples(writer.num_frames)])


def fit_length(samples_S: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """The first `length` samples, followed by silence if there are fewer."""
    return np.pad(samples_S[:length], (0, max(0, length - len(samples_S))))


def cover_frame(picture: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """An RGB frame (height, width, 3): the picture scaled (bicubic) to cover the frame and cropped about its centre.

    Only what stays in the frame is scaled, so that an extreme aspect ratio cannot ask for a huge intermediate picture.
    """
    scale = max(width / picture.width, height / picture.height)
    crop_width, crop_height = min(width / scale, picture.width), min(height / scale, picture.height)
    left, top = (picture.width - crop_width) / 2, (picture.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.uint8)


@contextlib.contextmanager
def _disk_full_is_exhaustion() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull("the disk for temporary files is full; free some or set TMPDIR") from None
