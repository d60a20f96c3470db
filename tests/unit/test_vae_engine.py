"""The VAE engine without a wire: framing of pictures, lengths of sound, clips on disk, cancellation."""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from services.vae.engine import ClipProgress, ClipWritten, VaeEngine, cover_frame, fit_length
from services.vae.mp4 import num_clip_samples
from services.vae.networks import Networks
from shared.errors import DiskFull
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE
from tests.vae_checkpoint import clip_content, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae"))


def _engine(folder: Path, chunk_latent_frames: int) -> VaeEngine:
    return VaeEngine(
        Networks(
            load_video_vae(folder / VIDEO_VAE_FILE, CPU, torch.float32),
            load_audio_vae(folder / AUDIO_VAE_FILE, CPU),
            load_vocoder(folder / VOCODER_FILE, CPU),
        ),
        chunk_latent_frames=chunk_latent_frames,
        fingerprint="",
    )


@pytest.fixture
def engine(folder: Path) -> Iterator[VaeEngine]:
    return _engine(folder, 1)


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("source", [(100, 300), (300, 100), (128, 192), (37, 41), (64, 96)])
def test_cover_frame_scales_to_cover_and_crops_the_centre(source: tuple[int, int]) -> None:
    """Against scaling the whole picture first, then cropping; pictures of 8-pixel grain, any other crop is far off."""
    height, width = 64, 96
    picture = _noise(*source)
    scale = max(width / picture.width, height / picture.height)
    whole = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    expected = np.asarray(whole.crop((left, top, left + width, top + height)), np.float32)
    framed = cover_frame(picture, height, width)
    assert framed.shape == (height, width, 3)
    assert framed.dtype == np.uint8
    # Rounding the scaled size and an odd crop shift the whole-picture way by up to half a pixel.
    assert np.abs(framed - expected).mean() < 6


@pytest.mark.parametrize("source", [(1, 50_000), (50_000, 1), (1, 1)])
def test_extreme_pictures_are_framed_without_a_huge_intermediate(source: tuple[int, int]) -> None:
    picture = Image.new("RGB", source[::-1], (10, 200, 30))
    assert (cover_frame(picture, 96, 64) == [10, 200, 30]).all()


@pytest.mark.parametrize(("length", "expected"), [(2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 3, 0, 0])])
def test_fit_length_cuts_or_pads_with_silence(length: int, expected: list[int]) -> None:
    fitted = fit_length(np.array([1, 2, 3], np.float32), length)
    assert fitted.tolist() == expected
    assert fitted.dtype == np.float32


def test_clip_samples_last_as_long_as_frames() -> None:
    assert [num_clip_samples(n) for n in (24, 1, 121, 241)] == [16_000, 667, 80_667, 160_667]


def test_progress_follows_the_chunks(folder: Path, tmp_path: Path) -> None:
    for chunk, done in ((1, [1, 5, 9, 13, 17]), (2, [5, 13, 17]), (9, [17])):
        events = list(_engine(folder, chunk).decode_clip(latent(48, 5, 2, 2), latent(4, 20), {}, tmp_path / "c.mp4"))
        assert events[:-1] == [ClipProgress(n, 17) for n in done]
        assert events[-1] == ClipWritten(num_frames=17, height=32, width=32, num_samples=11_333)


def test_frames_do_not_depend_on_the_chunk(folder: Path) -> None:
    video = latent(48, 6, 4, 2)
    one, two, four = (np.concatenate(list(_engine(folder, n).decode_video(video))) for n in (1, 2, 4))
    assert one.shape == (21, 64, 32, 3)
    assert np.array_equal(one, two)
    assert np.array_equal(one, four)


@pytest.mark.parametrize(("chunk", "lengths"), [(1, [1, 4, 4, 4, 4]), (2, [5, 8, 4]), (3, [9, 8]), (9, [17])])
def test_steps_of_several_latent_frames_are_handed_over_by_the_chunk(
    engine: VaeEngine, chunk: int, lengths: list[int]
) -> None:
    pictures = torch.arange(17)
    chunks = list(engine._networks.video_vae.regroup(pictures.split([1, 8, 8]), chunk))
    assert [len(part) for part in chunks] == lengths
    assert torch.equal(torch.cat(chunks), pictures)


def test_spooled_bytes_are_the_frames(engine: VaeEngine) -> None:
    video, file = latent(48, 3, 2, 4), io.BytesIO()
    ends = list(engine.spool_video(video, file))
    frames = np.concatenate(list(engine.decode_video(video)))
    assert file.getvalue() == frames.tobytes()
    assert ends == [32 * 64 * 3 * n for n in (1, 5, 9)]


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("mp4", "sound"))]


def test_an_abandoned_clip_lets_go_of_its_file_and_thread(engine: VaeEngine, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    events = engine.decode_clip(latent(48, 6, 2, 2), latent(4, 20), {}, path)
    next(events)
    events.close()
    open_files = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert path not in open_files
    assert not _threads()


def test_pictures_do_not_wait_for_sound(engine: VaeEngine, tmp_path: Path) -> None:
    """With the vocoder held until the last pictures but one chunk are encoded, the clip is the same."""
    video, audio = latent(48, 4, 2, 2), latent(4, 20)
    list(engine.decode_clip(video, audio, {}, tmp_path / "free.mp4"))
    go_on = threading.Event()
    hook = engine._networks.vocoder.register_forward_pre_hook(
        lambda *_: None if go_on.wait(60) else pytest.fail("held up")
    )
    events = engine.decode_clip(video, audio, {}, tmp_path / "held.mp4")
    before = [next(events) for _ in range(3)]
    go_on.set()
    hook.remove()
    assert before == [ClipProgress(n, 13) for n in (1, 5, 9)]
    assert isinstance(list(events)[-1], ClipWritten)
    assert clip_content(tmp_path / "held.mp4") == clip_content(tmp_path / "free.mp4")


def test_an_error_in_the_sound_fails_the_clip(engine: VaeEngine, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        list(engine.decode_clip(latent(48, 3, 2, 2), latent(4, 7), {}, tmp_path / "clip.mp4"))
    assert not _threads()


def test_an_error_in_the_pictures_fails_the_clip(engine: VaeEngine, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"47.*48|size"):
        list(engine.decode_clip(latent(47, 3, 2, 2), latent(4, 20), {}, tmp_path / "clip.mp4"))
    assert not _threads()


class _FullDisk(io.BytesIO):
    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_exhaustion(engine: VaeEngine, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="TMPDIR"):
        list(engine.spool_video(latent(48, 1, 2, 2), _FullDisk()))
    with pytest.raises(DiskFull, match="TMPDIR"):
        list(engine.decode_clip(latent(48, 9, 2, 2), latent(4, 20), {}, Path("/dev/full")))
