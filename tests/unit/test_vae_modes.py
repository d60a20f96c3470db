"""The VAE engine in memory modes: the same clips, memory given back, refusals before work, layouts when memory ends."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from services.vae.engine import ClipProgress, ClipWritten, VaeEngine
from services.vae.memory import VaeMemory, explain, mode_problem
from services.vae.model.video_layers import Carried, Raw, ReferenceOps, Upsampler
from services.vae.networks import Networks
from shared.errors import InvalidRequest, OutOfMemory
from shared.memory.estimate import VaeLayout, estimate_vae
from shared.memory.modes import RECIPES, VramMode
from shared.memory.sizes import RELEASED_VAE
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE
from tests.vae_checkpoint import clip_content, write_checkpoint

CPU = torch.device("cpu")
GIB = 2**30
UNLIMITED = VaeMemory(CPU, RELEASED_VAE, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae"))


def make_engine(folder: Path, memory: VaeMemory = UNLIMITED, ops: ReferenceOps | None = None) -> VaeEngine:
    networks = Networks(
        load_video_vae(folder / VIDEO_VAE_FILE, CPU, torch.float32, ops=ops),
        load_audio_vae(folder / AUDIO_VAE_FILE, CPU),
        load_vocoder(folder / VOCODER_FILE, CPU),
    )
    return VaeEngine(networks, memory=memory)


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


VIDEO, AUDIO = latent(48, 3, 2, 4), latent(6, 20)
PICTURE = np.random.default_rng(2).integers(0, 256, (32, 64, 3), np.uint8)


def clip(engine: VaeEngine, path: Path, mode: VramMode = VramMode.AUTO) -> tuple[int, bytes]:
    *_, last = engine.decode_clip(VIDEO, AUDIO, {}, path, mode)
    assert isinstance(last, ClipWritten)
    return clip_content(path)


def made(engine: VaeEngine, path: Path) -> tuple[tuple[int, bytes], bytes, bytes, bytes]:
    """Everything an engine makes."""
    frames = np.concatenate(list(engine.decode_video(VIDEO)))
    latent_bytes = engine.encode_image(PICTURE).numpy().tobytes()
    return clip(engine, path), frames.tobytes(), latent_bytes, engine.decode_audio(AUDIO).tobytes()


def test_every_mode_makes_the_same_there_and_back(folder: Path, tmp_path: Path) -> None:
    engine = make_engine(folder)
    expected = made(engine, tmp_path / "clip.mp4")
    for mode in (VramMode.STREAMED, VramMode.ULTRA_LOW, VramMode.STANDARD, VramMode.FP8, VramMode.STANDARD):
        engine.set_mode(mode)
        assert engine.mode is mode
        assert engine._networks.hosted == RECIPES[mode].takes_turns
        assert made(engine, tmp_path / "clip.mp4") == expected, mode


def test_a_job_in_another_mode_leaves_the_service_in_its_own(folder: Path, tmp_path: Path) -> None:
    engine = make_engine(folder)
    expected = clip(engine, tmp_path / "clip.mp4")
    assert clip(engine, tmp_path / "clip.mp4", VramMode.STREAMED) == expected
    assert engine.mode is VramMode.STANDARD
    assert clip(engine, tmp_path / "clip.mp4") == expected
    assert not engine._networks.hosted
    engine.set_mode(VramMode.STREAMED)
    assert clip(engine, tmp_path / "clip.mp4", VramMode.STANDARD) == expected
    assert engine._networks.hosted, "nothing stays on a device that others have next"


def storages(engine: VaeEngine) -> dict[str, weakref.ref[torch.UntypedStorage]]:
    networks = engine._networks
    tensors = networks.video_vae.decoder.tensors() | dict(networks.vocoder.named_parameters())
    tensors |= dict(networks.video_vae.network.encoder.named_parameters())
    return {name: weakref.ref(tensor.untyped_storage()) for name, tensor in tensors.items()}


def test_weights_are_on_the_device_while_they_are_used_only(folder: Path) -> None:
    """Host memory is one buffer a component; a turn's copy is another, of the component in use alone."""
    engine = make_engine(folder)
    engine.set_mode(VramMode.STREAMED)
    host = {name: storage() for name, storage in storages(engine).items()}
    assert len(set(host.values())) == 3
    frames = engine.decode_video(VIDEO)
    next(frames)
    used = storages(engine)
    moved = {name for name, storage in used.items() if storage() is not host[name]}
    assert moved == engine._networks.video_vae.decoder.tensors().keys()
    turn = [used[name] for name in moved]
    assert None not in {storage() for storage in turn}
    frames.close()
    assert {storage() for storage in turn} == {None}
    assert {name: storage() for name, storage in storages(engine).items()} == host


@pytest.mark.parametrize("budget_gib", [2.0, 0.1])
def test_what_does_not_fit_is_refused_with_numbers_before_any_work(
    folder: Path, tmp_path: Path, budget_gib: float
) -> None:
    memory = dataclasses.replace(UNLIMITED, budget_bytes=int(budget_gib * GIB))
    engine, path = make_engine(folder, memory), tmp_path / "clip.mp4"
    says = rf"decoder needs \d\.\d GiB on cpu for pictures of 960 x 960, {budget_gib} GiB may be used"
    with pytest.raises(OutOfMemory, match=says):
        next(engine.decode_clip(torch.empty(48, 1, 60, 60), AUDIO, {}, path))
    with pytest.raises(OutOfMemory, match=says):
        engine.set_mode(VramMode.STREAMED)
    assert not path.exists() and engine.mode is VramMode.STANDARD and not engine._networks.hosted
    assert explain(memory.least(VramMode.STREAMED, 960, 960), 960, 960).endswith(
        f"of {budget_gib} GiB for pictures of 960 x 960"
    )


def test_modes_that_cannot_be_had_are_refused() -> None:
    assert "CPU" in (mode_problem(VramMode.ALL_GPU, CPU, 1) or "")
    assert "2 ranks" in (mode_problem(VramMode.FP8_OFFLOAD, CPU, 2) or "")
    assert mode_problem(VramMode.ALL_GPU, torch.device("cuda"), 2) is None
    assert mode_problem(VramMode.AUTO, CPU, 2) is None
    for mode, num_ranks in ((VramMode.ALL_GPU, 1), (VramMode.STREAMED, 2)):
        with pytest.raises(InvalidRequest, match="vram_mode"):
            dataclasses.replace(UNLIMITED, num_ranks=num_ranks).settle(mode)
    assert dataclasses.replace(UNLIMITED, num_ranks=2).settle(VramMode.AUTO) is VramMode.STANDARD


class ScarceOps(ReferenceOps):
    """A device that runs out of memory as upsampled frames get larger than there is room for."""

    def __init__(self, latent_frames_per_step: int, too_large: Callable[[torch.Size], bool]) -> None:
        self.latent_frames_per_step = latent_frames_per_step
        self._too_large = too_large
        self.held: list[weakref.ref[torch.Tensor]] = []

    def upsample(self, upsampler: Upsampler, x_FHWC: torch.Tensor, carried: Carried) -> Raw:
        if self._too_large(x_FHWC.shape):
            self.held.append(weakref.ref(x_FHWC))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has more to say")
        return super().upsample(upsampler, x_FHWC, carried)


def late(too_large: Callable[[torch.Size], bool], calls: int) -> Callable[[torch.Size], bool]:
    """The same, from some call on."""
    counted = iter(range(10**6))
    return lambda shape: next(counted) >= calls and too_large(shape)


@pytest.mark.parametrize("calls", [0, 8], ids=["at-once", "in-the-middle"])
@pytest.mark.parametrize("mode", [VramMode.STANDARD, VramMode.STREAMED])
def test_memory_that_runs_out_is_made_do_with_by_fewer_frames_at_once(
    folder: Path, tmp_path: Path, mode: VramMode, calls: int
) -> None:
    """Frames that were handed over before are not handed over again; another order of sums may move one by a level."""
    video = latent(48, 6, 2, 2)
    whole = np.concatenate(list(make_engine(folder).decode_video(video)))
    ops = ScarceOps(2, late(lambda shape: shape[0] > 4, calls))
    frames = np.concatenate(list(make_engine(folder, ops=ops).decode_video(video, mode)))
    assert len(ops.held) == 1
    assert frames.shape == whole.shape and np.abs(frames.astype(int) - whole).max() <= 1
    ops = ScarceOps(2, late(lambda shape: shape[0] > 4, calls))
    events = list(make_engine(folder, ops=ops).decode_clip(video, AUDIO, {}, tmp_path / "clip.mp4", mode))
    done = [event.frames_done for event in events if isinstance(event, ClipProgress)]
    assert len(ops.held) == 1 and done == sorted(done) and done[-1] == 21
    assert isinstance(events[-1], ClipWritten) and events[-1].num_frames == 21


@pytest.mark.parametrize("frames_per_step", [1, 2])
def test_memory_that_runs_out_is_made_do_with_by_tiles(folder: Path, frames_per_step: int) -> None:
    """Of 16 latent pixels a side a tile of 8 sees 15; at the next levels there is room for 30 and 60 of 32 and 64."""
    budget = estimate_vae(RELEASED_VAE, 256, 256, VaeLayout(1, None)).reserved
    memory = dataclasses.replace(UNLIMITED, budget_bytes=budget)
    ops = ScarceOps(frames_per_step, lambda shape: shape[1] in (32, 64))
    engine = make_engine(folder, memory, ops)
    video = latent(48, 2, 16, 16)
    frames = np.concatenate(list(engine.decode_video(video)))
    assert len(ops.held) == 1
    expected = np.concatenate(list(make_engine(folder).decode_video(video)))
    assert frames.shape == expected.shape == (5, 256, 256, 3)
    assert np.abs(frames.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", [VramMode.STANDARD, VramMode.STREAMED])
def test_memory_that_runs_out_again_fails_the_clip_with_numbers_and_the_engine_lives(
    folder: Path, tmp_path: Path, mode: VramMode
) -> None:
    full = [True]
    memory = dataclasses.replace(UNLIMITED, budget_bytes=20 * GIB)
    ops = ScarceOps(2, lambda _: full[0])
    engine = make_engine(folder, memory, ops)
    engine.set_mode(mode)
    numbers = r"estimated: \d\.\d GiB, 20\.0 GiB may be used"
    says = rf"ran out in mode {mode.value} \({numbers}\): CUDA out of memory\. .* GiB\.;"
    with pytest.raises(OutOfMemory, match=says) as caught:
        clip(engine, tmp_path / "clip.mp4")
    assert [tensor() for tensor in ops.held] == [None, None], "what the failed decode held is free"
    assert "more to say" not in caught.value.message
    full[0] = False
    assert clip(engine, tmp_path / "clip.mp4") == clip(make_engine(folder), tmp_path / "other.mp4")


def test_memory_that_runs_out_in_the_sound_has_numbers_too(folder: Path, tmp_path: Path) -> None:
    engine = make_engine(folder)

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = engine._networks.vocoder.register_forward_pre_hook(run_out)
    for mode in (VramMode.STANDARD, VramMode.STREAMED):
        with pytest.raises(OutOfMemory, match=f"memory of cpu ran out in mode {mode.value}"):
            clip(engine, tmp_path / "clip.mp4", mode)
    with pytest.raises(OutOfMemory, match="no limit"):
        engine.decode_audio(AUDIO)
    hook.remove()
    assert engine.decode_audio(AUDIO).std() > 0


def test_a_clip_in_tiles_can_be_stopped_before_its_first_frame(folder: Path, tmp_path: Path) -> None:
    budget = estimate_vae(RELEASED_VAE, 256, 256, VaeLayout(1, 12)).reserved
    engine = make_engine(folder, dataclasses.replace(UNLIMITED, budget_bytes=budget))
    assert engine.plan(VramMode.STANDARD, 256, 256).layout == VaeLayout(1, 12)
    events = engine.decode_clip(latent(48, 2, 16, 16), AUDIO, {}, tmp_path / "clip.mp4")
    assert next(events) == ClipProgress(1, 5), "the first of four tiles is decoded"
    events.close()
    assert engine.encode_image(PICTURE).isfinite().all()
