"""The profiles in deploy/profiles are what the command makes; what `ovi doctor` says about memory."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.doctor import Verdict, memory_findings
from cli.main import app
from cli.profiles import CARDS, CLIPS, Card, profile
from shared.memory.modes import RECIPES, VramMode

COMMITTED = Path(__file__).parents[2] / "deploy" / "profiles"
GIB = 2**30


def test_the_committed_profiles_are_what_the_command_makes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profiles", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    made = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED.iterdir()}
    assert made == committed, "run `ovi profiles` and commit deploy/profiles"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_profile_is_toml_that_adds_up(card: Card) -> None:
    content = tomllib.loads(profile(card))
    assert set(content["clips"]) == {clip.name for clip in CLIPS}
    for clip in content["clips"].values():
        if "refused" in clip:
            assert "may be used" in clip["refused"]
            continue
        recipe = RECIPES[VramMode(clip["vram_mode"])]
        assert clip["lossless"] is recipe.lossless
        contexts = sum(stage.pop("CUDA context", 0.0) for stage in clip["gib"].values())
        reserved = [sum(stage.values()) for stage in clip["gib"].values()]
        together = max(reserved) if recipe.takes_turns else sum(reserved)
        assert clip["takes_gib"] == pytest.approx(contexts + together, abs=0.15)
        assert clip["takes_gib"] <= clip["usable_gib"] < content["card"]["free_gib"]


def test_every_card_of_the_list_can_make_the_smallest_clip() -> None:
    assert [card.name for card in CARDS] == [
        "8gb",
        "12gb",
        "16gb",
        "24gb",
        "32gb",
        "48gb",
        "80gb",
        "4x24gb",
        "unified_128gb",
    ]
    for card in CARDS:
        smallest = tomllib.loads(profile(card))["clips"][CLIPS[0].name]
        assert smallest["lossless"] is True


def test_a_folder_that_cannot_be_written_names_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = CliRunner().invoke(app, ["profiles", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "--out: " in result.output and "cannot be written" in result.output


def test_the_doctor_says_what_auto_would_choose() -> None:
    card = Card("any", 12282, 400, "8.9", num_gpus=2)
    findings = list(memory_findings(card.devices[:1], 64 * GIB))
    assert [finding.subject for finding in findings] == [f"cuda:0 {clip.name}" for clip in CLIPS]
    assert all(finding.state.startswith("streamed on cuda:0, lossless") for finding in findings)
    assert all(finding.verdict is Verdict.GOOD for finding in findings)
    (finding, *_) = memory_findings(card.devices[:1], 8 * GIB)
    assert finding.verdict is Verdict.NOTE
    assert "of weights stay in the host's memory, which has 8 GiB free" in finding.advice
    (finding, *_) = memory_findings(card.devices, 64 * GIB)
    assert finding.subject == f"2 GPUs {CLIPS[0].name}"


def test_the_doctor_says_what_is_lossy_and_what_does_not_fit() -> None:
    *_, largest = memory_findings(Card("any", 8188, 400, "8.9").devices, 64 * GIB)
    assert largest.verdict is Verdict.NOTE and "LOSSY: int8" in largest.state and "lossy: " in largest.advice
    *_, largest = memory_findings(Card("any", 6144, 400, "8.9").devices, 64 * GIB)
    assert largest.verdict is Verdict.NOTE and largest.state.startswith("ultra_low needs ")
