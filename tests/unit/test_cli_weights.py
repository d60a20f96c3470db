"""What the command reads of a checkpoint folder, against the files' own loaders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cli.checkpoints.presets import PRESETS
from cli.checkpoints.synth import SynthRequest, synthesize
from cli.stack.weights import clips_of, sizes_of
from services.fusion.checkpoint import FusionFile
from shared.memory.sizes import RELEASED, FusionSizes
from shared.variants import VARIANTS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    synthesize(SynthRequest("tiny", folder), on_file=lambda name, size: None)
    return folder


def test_sizes_are_those_of_the_files(tiny: Path) -> None:
    sizes = sizes_of(tiny)
    file = FusionFile.open(
        next(tiny / variant.file for variant in VARIANTS.values() if (tiny / variant.file).is_file())
    )
    assert sizes.fusion == FusionSizes.of_widths(**dataclasses.asdict(file.config))
    assert file.config == PRESETS["tiny"].fusion
    assert sizes.vae.total_bytes < 0.01 * RELEASED.vae.total_bytes
    assert sizes.text_encoder.total_bytes < 0.01 * RELEASED.text_encoder.total_bytes


def test_clips_have_the_area_that_the_files_say(tiny: Path) -> None:
    clips = clips_of(tiny)
    assert [clip.tokens.video for clip in clips] == sorted(clip.tokens.video for clip in clips)
    assert all(0.8 * 96 * 96 < clip.height * clip.width < 1.2 * 96 * 96 for clip in clips)
    there = {variant.id for variant in VARIANTS.values() if (tiny / variant.file).is_file()}
    assert {clip.name for clip in clips} == there


def test_what_is_missing_or_damaged_counts_as_released(tmp_path: Path) -> None:
    assert sizes_of(tmp_path) == RELEASED
    assert len(clips_of(tmp_path)) == len(VARIANTS)
    for content in (b"", b"\x00" * 4, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]", b"\x02" + b"\x00" * 7 + b"{}"):
        path = tmp_path / VARIANTS["960x960_10s"].file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert sizes_of(tmp_path) == RELEASED
