"""VAE weight files: layouts equal the release's, widths come from the file, wrong files are refused by name."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.vae.checkpoint import (
    RELEASED_AUDIO_VAE,
    RELEASED_VIDEO_VAE,
    RELEASED_VOCODER,
    anti_alias_filter,
    audio_vae_layout,
    load_audio_vae,
    load_video_vae,
    load_vocoder,
    video_vae_layout,
    vocoder_layout,
)
from shared.checkpoints import Layout
from shared.errors import CheckpointError
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE
from tests.parity.comparison import GoldenFile
from tests.vae_checkpoint import SMALL_AUDIO_VAE, SMALL_VIDEO_VAE, SMALL_VOCODER, random_weights, released_layout

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent.parent / "golden"


def _video(path: Path) -> torch.nn.Module:
    return load_video_vae(path, CPU, torch.float32)


def _audio(path: Path) -> torch.nn.Module:
    return load_audio_vae(path, CPU)


def _vocoder(path: Path) -> torch.nn.Module:
    return load_vocoder(path, CPU)


CASES = [
    pytest.param(_video, video_vae_layout(SMALL_VIDEO_VAE), id="video"),
    pytest.param(_audio, audio_vae_layout(SMALL_AUDIO_VAE), id="audio"),
    pytest.param(_vocoder, vocoder_layout(SMALL_VOCODER), id="vocoder"),
]
Load = Callable[[Path], torch.nn.Module]


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        (VIDEO_VAE_FILE, video_vae_layout(RELEASED_VIDEO_VAE)),
        (AUDIO_VAE_FILE, audio_vae_layout(RELEASED_AUDIO_VAE)),
        (VOCODER_FILE, vocoder_layout(RELEASED_VOCODER)),
    ],
)
def test_layouts_at_released_widths_are_the_released_layouts(file: str, layout: Layout) -> None:
    assert layout == released_layout(file)


@pytest.mark.parametrize(
    ("load", "layout", "config"),
    [
        (_video, video_vae_layout, dataclasses.replace(SMALL_VIDEO_VAE, base_dim=12, decoder_base_dim=4)),
        (_audio, audio_vae_layout, dataclasses.replace(SMALL_AUDIO_VAE, hidden_dim=6, num_res_blocks=1, mel_bins=40)),
        (
            _vocoder,
            vocoder_layout,
            dataclasses.replace(SMALL_VOCODER, upsample_kernel_sizes=(16, 16, 8), resblock_kernel_sizes=(3, 5)),
        ),
    ],
)
def test_widths_come_from_the_file(
    load: Load, layout: Callable[[object], Layout], config: object, tmp_path: Path
) -> None:
    path = tmp_path / "file.pth"
    torch.save(random_weights(layout(config)), path)
    assert load(path).config == config


def test_anti_alias_filter_is_the_one_in_trained_files() -> None:
    golden = GoldenFile.read(GOLDEN / "audio_vae.safetensors")
    stored = golden.tensors["vocoder.resblocks.0.activations.0.upsample.filter"]
    torch.testing.assert_close(anti_alias_filter(), stored, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("load", "layout"), CASES)
def test_a_missing_file_is_named(load: Load, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such file.*ovi models synth"):
        load(tmp_path / "absent.pth")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
@pytest.mark.parametrize(("load", "layout"), CASES)
def test_a_truncated_file_is_named(load: Load, layout: Layout, kept: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(random_weights(layout), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=r"weights\.pth: "):
        load(path)


@pytest.mark.parametrize(("load", "layout"), CASES)
def test_missing_surplus_and_misshapen_tensors_are_named(load: Load, layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = random_weights(layout)
    victim = [key for key in weights if "middle.0" in key or "mid.block_1" in key or "resblocks.1.convs2" in key][-1]
    changes = {
        "missing": {key: value for key, value in weights.items() if key != victim},
        "unexpected": weights | {"stranger.weight": torch.zeros(1)},
        "has shape": weights | {victim: torch.zeros(3, 5)},
    }
    for word, changed in changes.items():
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=rf"weights\.pth: does not fit the model: .*{word}"):
            load(path)


@pytest.mark.parametrize(("load", "layout"), CASES)
@pytest.mark.parametrize(
    "content", [{}, {"a": torch.zeros(2)}, {"a": {"b": {"c": torch.zeros(2)}}}, [torch.zeros(2)], {1: 2}]
)
def test_other_files_are_refused(load: Load, layout: Layout, content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: "):
        load(path)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (eval, ("__import__('pathlib').Path('exploded').touch()",))


@pytest.mark.parametrize(("load", "layout"), CASES)
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickle_bombs_are_refused(
    load: Load, layout: Layout, write: Callable[[object, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    write({"encoder.conv1.weight": _Bomb()}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: "):
        load(path)
    assert not Path("exploded").exists()


def test_widths_that_make_no_network_are_refused(tmp_path: Path) -> None:
    """Every width alone is possible, but the shortcuts cannot divide them."""
    config = dataclasses.replace(SMALL_VIDEO_VAE, base_dim=8)
    weights = random_weights(video_vae_layout(config))
    weights["encoder.downsamples.1.downsamples.0.residual.2.weight"] = torch.zeros(8 * 7, 8, 3, 3, 3)
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth: "):
        load_video_vae(path, CPU, torch.float32)


def test_another_vae_of_the_family_is_refused_by_its_strides(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL_VIDEO_VAE, temporal_downsample=(False, False, True))
    path = tmp_path / "weights.pth"
    torch.save(random_weights(video_vae_layout(config)), path)
    with pytest.raises(CheckpointError, match=r"strides 16 \(space\) and 2 \(time\).*must be 16, 4"):
        load_video_vae(path, CPU, torch.float32)
