"""Checking a checkpoint folder: every file, key, shape and dtype, in words."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli.checkpoints.presets import is_fp8, released_layouts
from services.fusion.checkpoint import FusionFile
from services.fusion.checkpoint import layout as fusion_layout
from services.fusion.model.config import RELEASED as RELEASED_FUSION
from services.text_encoder.checkpoint import infer_config as infer_text_encoder_config
from services.text_encoder.checkpoint import layout as text_encoder_layout
from services.text_encoder.config import RELEASED as RELEASED_TEXT_ENCODER
from services.text_encoder.tokenizer import PromptTokenizer
from services.vae.checkpoint import (
    RELEASED_AUDIO_VAE,
    RELEASED_VIDEO_VAE,
    RELEASED_VOCODER,
    audio_vae_layout,
    canonical_vocoder_layout,
    infer_audio_config,
    infer_video_config,
    infer_vocoder_config,
    video_vae_layout,
    vocoder_layout,
)
from shared.checkpoints import Layout, layout_of, layout_problems, read_pth
from shared.errors import CheckpointError
from shared.variants import (
    AUDIO_VAE_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VARIANTS,
    VIDEO_VAE_FILE,
    VOCODER_FILE,
    Variant,
)

_MAX_PROBLEMS_PER_FILE = 8
_FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.bfloat16, torch.float32})


class Verdict(enum.Enum):
    """What was found of a file."""

    GOOD = "good"
    ABSENT = "absent"
    """Missing, but not needed: a variant beside another."""
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True)
class FileReport:
    """One file of the released layout."""

    name: str
    verdict: Verdict
    num_bytes: int = 0
    description: str = ""
    """Its widths, if it is good."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderReport:
    """A whole folder."""

    files: tuple[FileReport, ...]
    problems: tuple[str, ...]
    """In words, each naming its file."""

    @property
    def complete(self) -> bool:
        """True if the services can start from it."""
        return not self.problems

    @property
    def summary(self) -> str:
        """One sentence."""
        good = [v.id for v in VARIANTS.values() if self._verdict(v.file) is Verdict.GOOD]
        absent = [v.id for v in VARIANTS.values() if self._verdict(v.file) is Verdict.ABSENT]
        if not self.complete:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            return f"{count}. `ovi models synth --out DIR` makes a complete synthetic folder."
        also = f" Not there: {', '.join(absent)}." if absent else ""
        return f"Complete: {', '.join(good)} can be served.{also}"

    def _verdict(self, name: str) -> Verdict:
        return next(file.verdict for file in self.files if file.name == name)


def check_folder(folder: Path) -> FolderReport:
    """Check every released file of a folder; nothing is loaded but headers and key lists, nothing is unpickled."""
    fusion = [_checked(folder, variant.file, partial(_check_fusion, variant)) for variant in VARIANTS.values()]
    stages = [
        _checked(folder, TEXT_ENCODER_FILE, _check_text_encoder),
        _checked(folder, TOKENIZER_FOLDER, _check_tokenizer),
        _checked(folder, VIDEO_VAE_FILE, _check_video_vae),
        _checked(folder, AUDIO_VAE_FILE, _check_audio_vae),
        _checked(folder, VOCODER_FILE, _check_vocoder),
    ]
    missing = [file.name for file in fusion if file.verdict is Verdict.MISSING]
    problems = []
    if len(missing) == len(fusion):
        problems.append(f"no fusion model: at least one of {', '.join(missing)} is needed")
    else:
        fusion = [FileReport(f.name, Verdict.ABSENT) if f.name in missing else f for f in fusion]
    problems += [f"{file.name}: missing" for file in stages if file.verdict is Verdict.MISSING]
    problems += [f"{file.name}: {problem}" for file in [*fusion, *stages] for problem in file.problems]
    problems += _disagreements(folder, [*fusion, *stages])
    return FolderReport((*fusion, *stages), tuple(problems))


_Found = tuple[str, list[str]]
"""Widths in words, and problems."""


def _checked(folder: Path, name: str, check: Callable[[Path], _Found]) -> FileReport:
    path = folder / name
    if not path.exists():
        return FileReport(name, Verdict.MISSING)
    num_bytes = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    try:
        description, problems = check(path)
    except CheckpointError as error:
        description, problems = "", [error.message.removeprefix(f"{path}: ")]
    if len(problems) > _MAX_PROBLEMS_PER_FILE:
        more = len(problems) - _MAX_PROBLEMS_PER_FILE
        problems = [*problems[:_MAX_PROBLEMS_PER_FILE], f"and {more} more"]
    return FileReport(name, Verdict.WRONG if problems else Verdict.GOOD, num_bytes, description, tuple(problems))


def _problems(found: Layout, expected: Layout, *, file: str, released: bool) -> list[str]:
    """Against the layout of the file's own widths; at the released widths against the released list itself."""
    if released:
        expected = released_layouts()[file]
    return layout_problems(found, expected, dtypes=True)


def _check_fusion(variant: Variant, path: Path) -> _Found:
    file = FusionFile.open(path)
    config = file.config
    area = f", {file.video_area} pixels" if file.video_area else ""
    released = config == RELEASED_FUSION
    described = f"width {config.dim}, {config.num_heads} heads, {config.num_layers} blocks, {file.precision}{area}"
    if not is_fp8(variant):
        expected = released_layouts()[variant.file] if released else fusion_layout(config)
        return described, layout_problems(file.header.layout, expected, dtypes=True)
    other = {str(dtype) for dtype, _ in file.header.layout.values() if dtype not in _FP8_DTYPES}
    problems = [f"has tensors of {name}; allowed are e4m3, bfloat16 and float32" for name in sorted(other)]
    if file.precision != "float8_e4m3fn":
        problems.append(f"its blocks are {file.precision}, must be float8_e4m3fn")
    return described, problems


def _check_text_encoder(path: Path) -> _Found:
    found = layout_of(read_pth(path))
    config = infer_text_encoder_config(path, found)
    released = config == RELEASED_TEXT_ENCODER
    described = f"width {config.dim}, {config.num_heads} heads, {config.num_layers} blocks, {config.vocab_size} tokens"
    return described, _problems(found, text_encoder_layout(config), file=TEXT_ENCODER_FILE, released=released)


def _check_tokenizer(path: Path) -> _Found:
    return f"ids up to {PromptTokenizer.read(path).max_id}", []


def _check_video_vae(path: Path) -> _Found:
    found = layout_of(read_pth(path))
    config = infer_video_config(found, path)
    released = config == RELEASED_VIDEO_VAE
    described = f"width {config.base_dim} in, {config.decoder_base_dim} out"
    return described, _problems(found, video_vae_layout(config), file=VIDEO_VAE_FILE, released=released)


def _check_audio_vae(path: Path) -> _Found:
    found = layout_of(read_pth(path))
    config = infer_audio_config(found, path)
    released = config == RELEASED_AUDIO_VAE
    described = f"width {config.hidden_dim}, {config.mel_bins} mel bins"
    return described, _problems(found, audio_vae_layout(config), file=AUDIO_VAE_FILE, released=released)


def _check_vocoder(path: Path) -> _Found:
    found = canonical_vocoder_layout(layout_of(read_pth(path)))
    config = infer_vocoder_config(found, path)
    released = config == RELEASED_VOCODER
    described = f"width {config.initial_channels}, {config.samples_per_frame} samples a mel frame"
    return described, _problems(found, vocoder_layout(config), file=VOCODER_FILE, released=released)


def _disagreements(folder: Path, files: list[FileReport]) -> list[str]:
    """What good files say that does not fit together: text widths, and ids without an embedding row."""
    good = {file.name for file in files if file.verdict is Verdict.GOOD}
    if TEXT_ENCODER_FILE not in good:
        return []
    path = folder / TEXT_ENCODER_FILE
    config = infer_text_encoder_config(path, layout_of(read_pth(path)))
    problems = []
    for variant in VARIANTS.values():
        if variant.file in good:
            text_dim = FusionFile.open(folder / variant.file).config.text_dim
            if text_dim != config.dim:
                what = f"takes text rows of width {text_dim}, {TEXT_ENCODER_FILE} makes {config.dim}"
                problems.append(f"{variant.file}: {what}")
    if TOKENIZER_FOLDER in good:
        max_id = PromptTokenizer.read(folder / TOKENIZER_FOLDER).max_id
        if max_id >= config.vocab_size:
            what = f"gives ids up to {max_id}, {TEXT_ENCODER_FILE} knows {config.vocab_size}"
            problems.append(f"{TOKENIZER_FOLDER}: {what}")
    return problems
