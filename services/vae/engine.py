"""The VAE stage's work: pictures to latents, latents to frames, sound and clips. Knows no gRPC.

Everything here that touches the networks runs on the device thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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
from services.vae.decoding import PictureDecoder, PictureSource, let_go
from services.vae.memory import VaeMemory, explain, largest_picture
from services.vae.model.video_vae import VideoVae
from services.vae.mp4 import ClipWriter, num_clip_samples
from services.vae.networks import Networks
from services.vae.ops import select_ops
from shared.checkpoints import file_fingerprint
from shared.device_memory import freed, peak_gib, reset_peak
from shared.errors import DiskFull
from shared.logging import get_logger
from shared.memory.choose import VaePlan
from shared.memory.modes import RECIPES, VramMode
from shared.memory.sizes import RELEASED_VAE
from shared.shapes import AUDIO_LATENT_CHANNELS, VIDEO_LATENT_CHANNELS, VideoLatentShape
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE

log = get_logger(__name__)

_WARM_UP_SHAPE = (3, 44, 44)
"""Latent frames, rows and columns: one step of the network of each length that it makes."""


@dataclass(frozen=True)
class ClipProgress:
    """So many frames are in the file; in tiles, where all come at the end, the part of them that is decoded."""

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
    """The networks on one device, in one memory mode. All methods but `plan` are called on the device's thread."""

    def __init__(
        self,
        networks: Networks,
        *,
        chunk_latent_frames: int = 1,
        fingerprint: str = "",
        pictures: PictureSource | None = None,
        memory: VaeMemory | None = None,
        mode: VramMode = VramMode.STANDARD,
    ) -> None:
        """
        Args:
            networks: on the device.
            chunk_latent_frames: latent frames whose pictures are handed over together; see VaeOptions.
            fingerprint: of the weight files.
            pictures: how the video VAE decodes, if not alone.
            memory: plans for the device; None: nothing limits its memory.
            mode: in which work is done that does not say; not AUTO.
        """
        self._networks = networks
        self._device = networks.device
        self.memory = memory or VaeMemory(self._device, RELEASED_VAE, None)
        """Plans for the device."""
        self._pictures = PictureDecoder(networks.video_vae, self._device, self.memory, pictures)
        self._chunk_latent_frames = chunk_latent_frames
        self.fingerprint = fingerprint
        self.mode = mode
        """In which work is done that does not say."""

    @property
    def peak_device_gib(self) -> float | None:
        """Most GiB reserved since the last clip was begun; None on a CPU."""
        return peak_gib(self._device)

    @classmethod
    def load(
        cls,
        options: VaeOptions,
        memory: VaeMemory,
        mode: VramMode,
        spread: Callable[[VideoVae], PictureSource] | None = None,
    ) -> VaeEngine:
        """Read the three weight files.

        Args:
            options: flags of the service.
            memory: plans for the device.
            mode: not AUTO.
            spread: makes the video VAE's decoding that of several ranks; None: it decodes alone.

        Raises:
            CheckpointError: one is missing, damaged or does not fit; names the file.
            OutOfMemory: see `set_mode`.
        """
        stage = options.stage
        digest = hashlib.sha256("".join(file_fingerprint(stage.checkpoints / file) for file in WEIGHT_FILES).encode())
        networks = Networks(
            load_decoding(options),
            load_audio_vae(stage.checkpoints / AUDIO_VAE_FILE, stage.device),
            load_vocoder(stage.checkpoints / VOCODER_FILE, stage.device),
        )
        engine = cls(
            networks,
            chunk_latent_frames=options.chunk_latent_frames,
            fingerprint=digest.hexdigest()[:16],
            pictures=None if spread is None else spread(networks.video_vae),
            memory=memory,
        )
        engine.set_mode(mode)
        return engine

    def plan(self, mode: VramMode, height: int, width: int) -> VaePlan:
        """How pictures of height x width pixels are decoded; `mode` may be AUTO: the present one.

        Raises:
            OutOfMemory: they do not fit; with the numbers.
            InvalidRequest: the mode is not for this device, or not for several.
        """
        return self.memory.plan(self.mode if mode is VramMode.AUTO else mode, height, width)

    def set_mode(self, mode: VramMode) -> None:
        """Make a mode the present one, and move the weights where it wants them.

        Args:
            mode: AUTO: the best in which the largest usual picture fits.

        Raises:
            OutOfMemory: it does not fit; nothing has changed. As for the next.
            InvalidRequest: it is not for this device, or not for several.
        """
        mode = self.memory.settle(mode)
        size = largest_picture()
        plan = self.plan(mode, *size)
        with self._turn(mode, plan):
            self.mode = mode
        log.info("memory mode", plan=explain(plan, *size))

    def warm_up(self) -> None:
        """Decode a moment of picture and sound, so that no clip waits for kernels to be compiled; on CUDA only."""
        if self._device.type != "cuda":
            return
        start = time.perf_counter()
        # In the layout of the largest pictures: kernels are compiled for a number of frames.
        plan = self.plan(self.mode, *largest_picture())
        with self._turn(plan.mode, plan):
            for _ in self._decode_video(torch.zeros(VIDEO_LATENT_CHANNELS, *_WARM_UP_SHAPE), plan):
                pass
        self.decode_audio(torch.zeros(16, AUDIO_LATENT_CHANNELS))
        log.info("warmed up", seconds=round(time.perf_counter() - start, 3))

    def encode_image(self, frame_HWC: NDArray[np.uint8], mode: VramMode = VramMode.AUTO) -> torch.Tensor:
        """The normalised latent (48, 1, H/16, W/16), float32 on the CPU, of one RGB frame; see `cover_frame`.

        Raises:
            OutOfMemory: with the numbers.
        """
        with self._turn(mode), self._networks.encoding():
            pixels_HWC = torch.from_numpy(frame_HWC).to(self._device)
            pixels_BCFHW = pixels_HWC.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1.0
            return self._networks.video_vae.encode(pixels_BCFHW)[0].cpu()

    def decode_video(self, latent_CFHW: torch.Tensor, mode: VramMode = VramMode.AUTO) -> Iterator[NDArray[np.uint8]]:
        """RGB frames (f, 16H, 16W, 3) of a normalised latent, chunk by chunk, on the host; a chunk may be empty.

        Args:
            latent_CFHW: the latent.
            mode: AUTO: the present one.

        Raises:
            OutOfMemory: they do not fit, or memory ran out in the next smaller layout, too; with the numbers.
        """
        plan = self._plan_of(latent_CFHW, mode)
        with self._turn(plan.mode, plan):
            yield from self._decode_video(latent_CFHW, plan)

    def decode_audio(self, latent_SC: torch.Tensor, mode: VramMode = VramMode.AUTO) -> NDArray[np.float32]:
        """Mono samples in [-1, 1] at 16 kHz, 512 for each row of a latent (S, 20).

        Raises:
            OutOfMemory: with the numbers.
        """
        with self._turn(mode):
            return self._decode_audio(latent_SC)

    def spool_video(self, latent_CFHW: torch.Tensor, file: BinaryIO, mode: VramMode = VramMode.AUTO) -> Iterator[int]:
        """Append raw frames to `file`; yields the bytes readable so far after each chunk.

        A file stands between the device and the client, so that a slow client holds up neither device nor memory.

        Raises:
            DiskFull: the disk is full.
            OutOfMemory: see `decode_video`.
        """
        size = 0
        for frames_FHWC in self.decode_video(latent_CFHW, mode):
            with _disk_full_is_exhaustion():
                size += file.write(frames_FHWC.data) if len(frames_FHWC) else 0
                file.flush()
            yield size

    def decode_clip(
        self,
        video_CFHW: torch.Tensor,
        audio_SC: torch.Tensor,
        provenance: Mapping[str, str],
        path: Path,
        mode: VramMode = VramMode.AUTO,
    ) -> Iterator[ClipProgress | ClipWritten]:
        """Write the clip of both latents to `path`; progress after each chunk, then ClipWritten.

        Where weights stay on the device, sound is decoded at the same time as the pictures, on a thread and a stream of
        its own, else before them. A chunk is encoded on another thread while the device works at the next. Sound is cut
        or padded with silence to the length of the video.

        Raises:
            DiskFull: the disk is full.
            OutOfMemory: see `decode_video`.
        """
        reset_peak(self._device)
        shape = VideoLatentShape(*video_CFHW.shape[1:])
        plan = self._plan_of(video_CFHW, mode)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disk_full_is_exhaustion())
            stack.enter_context(self._turn(plan.mode, plan))
            sound = self._begin_sound(audio_SC, num_clip_samples(shape.num_frames), stack)
            writer = stack.enter_context(
                ClipWriter(path, height=shape.pixel_height, width=shape.pixel_width, provenance=provenance)
            )
            encoder = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="mp4"))
            encoding: Future[None] | None = None
            pictures = stack.enter_context(contextlib.closing(self._decode_video(video_CFHW, plan)))
            for frames_FHWC in pictures:
                if encoding is not None:
                    encoding.result()
                    done = max(writer.num_frames, int(self._pictures.part_done * shape.num_frames))
                    yield ClipProgress(done, shape.num_frames)
                encoding = encoder.submit(_add_chunk, writer, frames_FHWC, sound)
            if encoding is not None:
                encoding.result()
            writer.add_samples(sound.result()[writer.num_samples :])
        yield ClipProgress(writer.num_frames, shape.num_frames)
        yield ClipWritten(writer.num_frames, shape.pixel_height, shape.pixel_width, writer.num_samples)

    def _plan_of(self, latent_CFHW: torch.Tensor, mode: VramMode) -> VaePlan:
        shape = VideoLatentShape(*latent_CFHW.shape[1:])
        return self.plan(mode, shape.pixel_height, shape.pixel_width)

    @contextlib.contextmanager
    def _turn(self, mode: VramMode, plan: VaePlan | None = None) -> Iterator[None]:
        """The weights are where the mode wants them; afterwards the device is left to others as far as it says.

        AUTO is the present mode.

        Raises:
            OutOfMemory: instead of PyTorch's own error; with the numbers.
        """
        mode = self.mode if mode is VramMode.AUTO else mode
        try:
            self._networks.place(hosted=RECIPES[mode].takes_turns)
            yield
        except torch.OutOfMemoryError as error:
            raise self.memory.ran_out(mode, plan, let_go(error)) from None
        finally:
            if RECIPES[self.mode].takes_turns:
                self._networks.place(hosted=True)  # whatever this job's mode was
            if self._networks.hosted or mode is VramMode.ALL_GPU:
                log.info("memory freed", mode=mode.value, **freed(self._device))

    def _decode_video(self, latent_CFHW: torch.Tensor, plan: VaePlan) -> Generator[NDArray[np.uint8], None, None]:
        with self._networks.decoding():
            pictures = self._pictures.decode(latent_CFHW.to(self._device), plan.layout)
            for levels_FHWC in self._networks.video_vae.regroup(pictures, self._chunk_latent_frames):
                yield levels_FHWC.numpy()

    def _decode_audio(self, latent_SC: torch.Tensor) -> NDArray[np.float32]:
        networks = self._networks
        with networks.sounding():
            latent_BCL = latent_SC.to(self._device, torch.float32).T[None]
            samples: NDArray[np.float32] = networks.vocoder(networks.audio_vae.decode(latent_BCL))[0].cpu().numpy()
        return samples

    def _begin_sound(
        self, audio_SC: torch.Tensor, num_samples: int, stack: contextlib.ExitStack
    ) -> Future[NDArray[np.float32]]:
        """So many samples. Weights that are there for a turn come and go before the pictures' come."""
        if not self._networks.hosted:
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sound"))
            return thread.submit(self._decode_sound, audio_SC, num_samples)
        sound: Future[NDArray[np.float32]] = Future()
        sound.set_result(fit_length(self._decode_audio(audio_SC), num_samples))
        freed(self._device)
        return sound

    def _decode_sound(self, audio_SC: torch.Tensor, num_samples: int) -> NDArray[np.float32]:
        if self._device.type != "cuda":
            return fit_length(self._decode_audio(audio_SC), num_samples)
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return fit_length(self._decode_audio(audio_SC), num_samples)


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
