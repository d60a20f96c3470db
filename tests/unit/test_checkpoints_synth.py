"""Synthetic checkpoints: the released layout, the same bytes every time, values that make pictures and sound."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.checkpoints.presets import PRESETS, fusion_file_layout, fusion_metadata, released_layouts, stage_file_layouts
from cli.checkpoints.synth import SynthRequest, synthesize
from cli.checkpoints.values import Normal, ValuePool
from cli.checkpoints.writers import layout_bytes, replacing, write_pth, write_safetensors
from services.fusion.attention import sdpa
from services.fusion.checkpoint import FusionFile
from services.fusion.model.fusion import Branch
from services.fusion.model.operations import Ops
from services.text_encoder.engine import TextEngine
from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from shared.checkpoints import SafetensorsHeader, read_pth
from shared.errors import AlreadyExists, FailedPrecondition, InvalidRequest, ResourceExhausted
from shared.shapes import AudioLatentShape, VideoLatentShape
from shared.variants import AUDIO_VAE_FILE, TEXT_ENCODER_FILE, VARIANTS, VIDEO_VAE_FILE, VOCODER_FILE

_CPU = torch.device("cpu")
_LAYOUT_FILE = Path(__file__).parents[2] / "shared" / "checkpoint_layout.json"
_FIRST = VARIANTS["720x720_5s"].file
_FP8 = VARIANTS["720x720_5s_fp8"].file


def _synth(folder: Path, **changes: object) -> list[str]:
    written: list[str] = []
    request = replace(SynthRequest("tiny", folder), **changes)  # type: ignore[arg-type]
    synthesize(request, on_file=lambda name, size: written.append(name))
    return written


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_full_has_exactly_the_released_layout() -> None:
    listed = json.loads(_LAYOUT_FILE.read_text())
    full = PRESETS["full"]
    ours = stage_file_layouts(full)
    ours |= {v.file: fusion_file_layout(v, full.fusion) for v in VARIANTS.values() if v.file in listed}
    in_words = {
        file: {key: [str(dtype).removeprefix("torch."), *shape] for key, (dtype, shape) in layout.items()}
        for file, layout in ours.items()
    }
    assert in_words == listed
    assert fusion_metadata(full) == {}
    assert layout_bytes(ours[VARIANTS["960x960_10s"].file]) == 2 * 11_660_753_108


def test_the_released_list_covers_every_bfloat16_variant() -> None:
    files = {v.file for v in VARIANTS.values()} - {_FP8}
    assert released_layouts().keys() == files | {TEXT_ENCODER_FILE, VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE}


def test_the_same_seed_gives_the_same_bytes_and_another_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _synth(tmp_path / "again")
    _synth(tmp_path / "other", seed=1)
    first, again, other = (_digests(folder) for folder in (tiny_checkpoint, tmp_path / "again", tmp_path / "other"))
    assert again == first
    assert other.keys() == first.keys()
    weights = {name for name in first if name.endswith((".pth", ".pt", ".safetensors"))}
    assert len(weights) == 8
    assert not [name for name in weights if other[name] == first[name]]


def test_the_tiny_preset_is_small(tiny_checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_checkpoint.rglob("*") if path.is_file()) < 64e6


def test_variants_differ_and_the_fp8_file_is_the_first_one_rounded(tiny_checkpoint: Path) -> None:
    files = {variant.id: load_file(tiny_checkpoint / variant.file) for variant in VARIANTS.values()}
    first, fp8 = files["720x720_5s"], files["720x720_5s_fp8"]
    assert {len(file) for file in files.values()} == {len(first)}
    key = "video_model.blocks.0.self_attn.q.weight"
    for other in ("960x960_5s", "960x960_10s"):
        assert not torch.equal(files[other][key], first[key])
    assert fp8[key].dtype is torch.float8_e4m3fn
    assert fp8["video_model.patch_embedding.weight"].dtype is torch.bfloat16
    for name, tensor in fp8.items():
        # e4m3 keeps 3 bits: 1/16 of a value, or half its smallest step 2^-9; bfloat16 adds 1/256
        torch.testing.assert_close(tensor.float(), first[name].float(), rtol=0.0667, atol=2**-10)


def test_files_of_tensors_are_what_the_loaders_expect(tiny_checkpoint: Path) -> None:
    preset = PRESETS["tiny"]
    for variant in VARIANTS.values():
        file = FusionFile.open(tiny_checkpoint / variant.file)
        assert (file.config, file.video_area) == (preset.fusion, 96 * 96)
        assert SafetensorsHeader.read(tiny_checkpoint / variant.file).layout == fusion_file_layout(
            variant, preset.fusion
        )
    for name, layout in stage_file_layouts(preset).items():
        tensors = read_pth(tiny_checkpoint / name)
        assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == layout
        assert all(torch.isfinite(t).all() for t in tensors.values())


@torch.inference_mode()
def test_a_clip_is_moving_texture_and_soft_noise(tiny_checkpoint: Path) -> None:
    """Prompt to frames and samples through the real networks: neither flat nor saturated, still in no dimension."""
    engine = TextEngine.read(tiny_checkpoint, device=_CPU, precision=torch.float32, cache_bytes=0)
    prompt, negative = (item.embedding.rows_LC for item in engine.encode(["a storm at sea", "blur"], 0))
    model = FusionFile.open(tiny_checkpoint / _FIRST).load(_CPU, torch.float32)
    video_shape, audio_shape = VideoLatentShape.from_pixels(17, 96, 96), AudioLatentShape.from_seconds(5)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(video_shape.as_tuple(), generator=generator)
    audio = torch.randn(audio_shape.as_tuple(), generator=generator)
    texts = model.encode_texts([(prompt, prompt), (negative, negative)])
    rope = model.rope_tables(video_shape.as_tuple()[1:], audio_shape.length)
    sigmas = torch.linspace(1, 0, 9).tolist()
    for sigma, following in itertools.pairwise(sigmas):
        timestep = torch.tensor(1000 * sigma)
        positive, other = model(video, audio, timestep, [Branch(text) for text in texts], rope, Ops.of(sdpa))
        video = video + (following - sigma) * (other[0] + 4 * (positive[0] - other[0]))
        audio = audio + (following - sigma) * (other[1] + 3 * (positive[1] - other[1]))
    assert 0.5 < video.std() < 3
    assert 0.5 < audio.std() < 3
    vae = load_video_vae(tiny_checkpoint / VIDEO_VAE_FILE, _CPU, torch.float32)
    frames = torch.cat(list(vae.decode(video, torch.float32)))
    assert frames.shape == (17, 96, 96, 3)
    assert 0.1 < frames.std() < 0.7
    assert (frames.abs() == 1).float().mean() < 0.05
    for dim in (0, 1, 2):
        assert frames.diff(dim=dim).abs().mean() > 0.05
    mel = load_audio_vae(tiny_checkpoint / AUDIO_VAE_FILE, _CPU).decode(audio.T[None])
    samples = load_vocoder(tiny_checkpoint / VOCODER_FILE, _CPU)(mel)
    assert samples.shape == (1, audio_shape.num_samples)
    assert 0.02 < samples.std() < 0.3
    assert samples.abs().max() < 0.95


def test_chosen_variants_only(tmp_path: Path) -> None:
    _synth(tmp_path, variants=("960x960_5s",))
    assert [path.name for path in (tmp_path / "Ovi").iterdir()] == ["model_960x960.safetensors"]


def test_linked_variants_share_their_disk_space(tmp_path: Path) -> None:
    _synth(tmp_path, link_variants=True)
    bfloat16 = [tmp_path / v.file for v in VARIANTS.values() if v.file != _FP8]
    assert len({path.stat().st_ino for path in bfloat16}) == 1
    assert (tmp_path / _FP8).stat().st_ino != bfloat16[0].stat().st_ino
    _synth(tmp_path, force=True)
    assert len({path.stat().st_ino for path in bfloat16}) == 3


def test_files_that_are_there_are_kept_unless_forced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "Ovi").mkdir()
    (tmp_path / _FIRST).write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match=r"Ovi/model\.safetensors already; --force"):
        _synth(tmp_path)
    assert _digests(tmp_path) == {_FIRST: hashlib.sha256(b"mine").hexdigest()}
    _synth(tmp_path, force=True)
    assert _digests(tmp_path) == _digests(tiny_checkpoint)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"preset": "huge"}, {"preset"}),
        ({"variants": ("960x960_5s", "1080p")}, {"variants"}),
        ({"variants": ()}, {"variants"}),
        ({"seed": -1}, {"seed"}),
        ({"preset": "", "variants": ("x",), "seed": 2**63}, {"preset", "variants", "seed"}),
    ],
)
def test_bad_choices_are_all_named_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, object], fields: set[str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _synth(tmp_path / "out", **changes)
    assert {violation.field for violation in caught.value.violations} == fields
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceExhausted, match=r"0\.06 GB are needed, 0\.02 GB are free.*--link-variants"):
        _synth(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot be made"):
        _synth(tmp_path / "file" / "out")


def test_a_failed_file_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_halfway()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("weights", b"old")]


def test_both_formats_hold_the_drawn_values(tmp_path: Path) -> None:
    pool = ValuePool(3, 10_001)
    dtypes = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
    layout = {f"{shape}{dtype}": (dtype, shape) for dtype in dtypes for shape in ((), (7,), (3, 5), (101, 103))}

    def draw(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return pool.draw(key, shape, dtype, Normal(0.5, 2.0))

    write_safetensors(tmp_path / "a.safetensors", layout, {"k": "v"}, draw)
    write_pth(tmp_path / "a.pth", layout, draw)
    header = SafetensorsHeader.read(tmp_path / "a.safetensors")
    assert (header.layout, header.metadata) == (layout, {"k": "v"})
    for tensors in (load_file(tmp_path / "a.safetensors"), read_pth(tmp_path / "a.pth")):
        assert tensors.keys() == layout.keys()
        for key, (dtype, shape) in layout.items():
            assert torch.equal(tensors[key].float(), draw(key, shape, dtype).float())


@pytest.mark.parametrize("rows", [3, 90, 700])
def test_drawn_values_have_the_asked_distribution_and_no_equal_rows(rows: int) -> None:
    """Three sizes: direct, a slice of the finished pool, and longer than the pool."""
    pool = ValuePool(1, 10_001)
    drawn = pool.draw("w", (rows, 100), torch.float32, Normal(3.0, 0.5))
    assert len(drawn.unique(dim=0)) == rows
    error = 5 * 0.5 / math.sqrt(min(rows * 100, 10_001))
    assert abs(drawn.mean().item() - 3.0) < error
    assert abs(drawn.std().item() - 0.5) < error
    assert torch.equal(drawn, ValuePool(1, 10_001).draw("w", (rows, 100), torch.float32, Normal(3.0, 0.5)))
    assert not torch.equal(drawn, pool.draw("v", (rows, 100), torch.float32, Normal(3.0, 0.5)))
