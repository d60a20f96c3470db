"""Clips that play: mp4 files with pictures and sound, a different one for each seed, the same bytes in any process."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
import torch

FPS = 24
NUM_FRAMES, SIZE = 121, 64
SAMPLE_RATE_HZ = 16_000
_SOUND_PER_FRAME = SAMPLE_RATE_HZ // FPS


@dataclass(frozen=True)
class Played:
    """What a player gets of a clip."""

    num_frames: int
    num_samples: int


def encoded(video_CFHW: torch.Tensor, audio_SC: torch.Tensor) -> bytes:
    """An mp4 whose pictures and sound come of these latents: (48, F, H, W) and (S, 20), any numbers."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, width=SIZE, height=SIZE, pix_fmt="yuv420p")
        video.options = {"preset": "ultrafast", "threads": "1"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        for picture in _pictures(video_CFHW):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for number, samples in enumerate(_sound(audio_SC)):
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE_HZ, number * len(samples)
            container.mux(audio.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    return file.getvalue()


def played(clip: bytes) -> Played:
    """Decode everything that is in a clip.

    Raises:
        av.FFmpegError: it does not play.
    """
    with av.open(io.BytesIO(clip)) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
    with av.open(io.BytesIO(clip)) as container:
        num_samples = sum(frame.samples for frame in container.decode(audio=0))
    return Played(num_frames, num_samples)


def _pictures(video_CFHW: torch.Tensor) -> np.ndarray:
    """(NUM_FRAMES, SIZE, SIZE, 3) uint8: a latent frame's first channels, enlarged, four pictures of each."""
    first_FHWC = video_CFHW[:3].permute(1, 2, 3, 0).sigmoid().mul(255).byte().numpy()
    large = first_FHWC.repeat(SIZE // first_FHWC.shape[1], axis=1).repeat(SIZE // first_FHWC.shape[2], axis=2)
    return large.repeat(4, axis=0)[:NUM_FRAMES]


def _sound(audio_SC: torch.Tensor) -> np.ndarray:
    """(157, 512) float32 in -1..1: a tone a latent frame, whose pitch is its first channel."""
    pitch_hz = 200 + 600 * audio_SC[:, :1].sigmoid().numpy()
    times_s = np.arange(512, dtype=np.float32)[None] / SAMPLE_RATE_HZ
    return np.sin(2 * np.pi * pitch_hz * times_s).astype(np.float32) / 2
