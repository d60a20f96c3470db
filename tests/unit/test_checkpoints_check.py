"""`ovi models check`: whole folders, and each way of being broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli.checkpoints.check import Verdict, check_folder
from cli.checkpoints.commands import models_app
from cli.checkpoints.presets import PRESETS, fusion_file_layout
from shared.checkpoints import read_pth
from shared.variants import (
    AUDIO_VAE_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VARIANTS,
    VIDEO_VAE_FILE,
    VOCODER_FILE,
)

_FIRST = VARIANTS["720x720_5s"]
_FP8 = VARIANTS["720x720_5s_fp8"]
_RUNNER = CliRunner()


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny preset; files are links, so a test replaces a file and never writes into it."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy, copy_function=os.link)
    return copy


def _rewrite_pth(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = dict(read_pth(path))
    change(tensors)
    new = path.with_suffix(".new")
    torch.save(tensors, new)
    new.replace(path)


def _rewrite_safetensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata)


def _replace_bytes(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_whole_folder_is_complete(tiny_checkpoint: Path) -> None:
    report = check_folder(tiny_checkpoint)
    assert report.complete
    assert len(report.files) == 9
    assert {file.verdict for file in report.files} == {Verdict.GOOD}
    assert report.summary == "Complete: 720x720_5s, 960x960_5s, 960x960_10s, 720x720_5s_fp8 can be served."


def test_one_variant_is_enough(folder: Path) -> None:
    for variant in VARIANTS.values():
        if variant is not _FIRST:
            (folder / variant.file).unlink()
    report = check_folder(folder)
    assert report.complete
    assert report.summary.endswith("720x720_5s can be served. Not there: 960x960_5s, 960x960_10s, 720x720_5s_fp8.")
    (folder / _FIRST.file).unlink()
    report = check_folder(folder)
    assert report.problems == (
        f"no fusion model: at least one of {', '.join(v.file for v in VARIANTS.values())} is needed",
    )


@pytest.mark.parametrize("name", [TEXT_ENCODER_FILE, VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE, TOKENIZER_FOLDER])
def test_what_every_stage_needs_is_missed(folder: Path, name: str) -> None:
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert check_folder(folder).problems == (f"{name}: missing",)


def _half(path: Path) -> None:
    _replace_bytes(path, path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", [_FIRST.file, TEXT_ENCODER_FILE, VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE])
@pytest.mark.parametrize("damage", [_half, lambda path: _replace_bytes(path, b"")], ids=["half", "empty"])
def test_a_truncated_file_is_wrong(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    (problem,) = check_folder(folder).problems
    assert problem.startswith(f"{name}: ")
    assert "truncated" in problem


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (TEXT_ENCODER_FILE, "blocks.1.norm1.weight"),
        (VIDEO_VAE_FILE, "encoder.conv1.bias"),
        (AUDIO_VAE_FILE, "decoder.learnable_gain"),
        (VOCODER_FILE, "generator.conv_post.bias"),
    ],
)
def test_keys_shapes_and_dtypes_of_every_pth_are_checked(folder: Path, name: str, key: str) -> None:
    original = read_pth(folder / name)[key]
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        f"{name}: .*missing: {key}": lambda t: t.pop(key),
        f"{name}: .*unexpected: extra": lambda t: t.update(extra=torch.zeros(1)),
        f"{name}: .*{key} has shape": lambda t: t.update({key: torch.zeros(3, 3, dtype=original.dtype)}),
        f"{name}: {key} has dtype torch.float16": lambda t: t.update({key: original.half()}),
    }
    whole = (folder / name).read_bytes()
    for expected, change in changes.items():
        _rewrite_pth(folder / name, change)
        problems = check_folder(folder).problems
        assert any(re.search(expected, problem) for problem in problems), problems
        _replace_bytes(folder / name, whole)


def test_keys_shapes_and_dtypes_of_fusion_files_are_checked(folder: Path) -> None:
    key = "audio_model.blocks.3.norm3.bias"
    path = folder / _FIRST.file
    _rewrite_safetensors(path, lambda t: t.update({key: t[key].float()}))
    assert check_folder(folder).problems == (f"{_FIRST.file}: {key} has dtype torch.float32, must be torch.bfloat16",)
    _rewrite_safetensors(path, lambda t: t.update({key: t[key].bfloat16()[1:]}))
    (problem,) = check_folder(folder).problems
    assert f"{key} has shape [143], must be [144]" in problem
    _rewrite_safetensors(path, lambda t: t.pop(key))
    (problem,) = check_folder(folder).problems
    assert f"1 missing: {key}" in problem


def test_the_fp8_file_must_be_fp8_and_others_must_not(folder: Path) -> None:
    first, fp8 = (folder / _FIRST.file), (folder / _FP8.file)
    held = first.with_suffix(".held")
    first.rename(held)
    fp8.rename(first)
    held.rename(fp8)
    problems = check_folder(folder).problems
    assert any(p.startswith(f"{_FP8.file}: its blocks are bfloat16, must be float8_e4m3fn") for p in problems)
    assert any(p.startswith(f"{_FIRST.file}: ") and p.endswith("more") for p in problems)
    assert len(problems) <= 12


def test_the_other_spelling_of_weight_norm_is_good(folder: Path) -> None:
    def respell(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = key.replace("parametrizations.weight.original0", "weight_g")
            tensors[new.replace("parametrizations.weight.original1", "weight_v")] = tensors.pop(key)

    _rewrite_pth(folder / VOCODER_FILE, respell)
    assert check_folder(folder).complete


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", [TEXT_ENCODER_FILE, VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(folder: Path, name: str) -> None:
    (folder / name).unlink()
    torch.save({"x": _Bomb(folder / "exploded")}, folder / name)
    (problem,) = check_folder(folder).problems
    assert problem.startswith(f"{name}: refused, it holds more than tensors")
    assert not (folder / "exploded").exists()


def test_files_that_do_not_fit_together_are_told(folder: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for key in ("video_model.text_embedding.0.weight", "audio_model.text_embedding.0.weight"):
            tensors[key] = tensors[key][:, :48].clone()

    _rewrite_safetensors(folder / _FIRST.file, narrow)
    _rewrite_pth(
        folder / TEXT_ENCODER_FILE, lambda t: t.update({"token_embedding.weight": t["token_embedding.weight"][:900]})
    )
    assert check_folder(folder).problems == (
        f"{_FIRST.file}: takes text rows of width 48, {TEXT_ENCODER_FILE} makes 64",
        f"{TOKENIZER_FOLDER}: gives ids up to 999, {TEXT_ENCODER_FILE} knows 900",
    )


def test_at_the_released_widths_the_released_list_decides(tmp_path: Path) -> None:
    """A sparse file of the released fusion layout, with one dtype that the list does not have."""
    layout = fusion_file_layout(_FIRST, PRESETS["full"].fusion)
    key = "video_model.head.head.bias"
    layout[key] = (torch.float32, layout[key][1])
    path = tmp_path / _FIRST.file
    _write_sparse(path, layout)
    problems = check_folder(tmp_path).problems
    assert f"{_FIRST.file}: {key} has dtype torch.float32, must be torch.bfloat16" in problems


def _write_sparse(path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """The header of a real file, and a hole of the right length instead of 23 GB of values."""
    path.parent.mkdir(parents=True)
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    header, end = {}, 0
    for key, (dtype, shape) in layout.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_the_commands_say_and_exit_as_they_should(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made = _RUNNER.invoke(models_app, ["synth", "--preset", "tiny", "--out", out, "--variants", "720x720_5s"])
    assert made.exit_code == 0, made.output
    assert "Ovi/model.safetensors" in made.output
    checked = _RUNNER.invoke(models_app, ["check", out])
    assert checked.exit_code == 0, checked.output
    assert "Complete: 720x720_5s can be served" in checked.output
    again = _RUNNER.invoke(models_app, ["synth", "--out", out])
    assert again.exit_code == 1
    assert "--force" in again.output
    bad = _RUNNER.invoke(models_app, ["synth", "--preset", "huge", "--out", out])
    assert bad.exit_code == 2
    assert "'huge'" in bad.output
    (tmp_path / "out" / VOCODER_FILE).unlink()
    broken = _RUNNER.invoke(models_app, ["check", out])
    assert broken.exit_code == 1
    assert f"{VOCODER_FILE}: missing" in broken.output
    nothing = _RUNNER.invoke(models_app, ["check", str(tmp_path / "nowhere")])
    assert nothing.exit_code == 1
