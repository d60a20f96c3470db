"""What the command refuses before it starts anything, and how it says so."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.errors import EXIT_BAD_INPUT, EXIT_FAILED, UsageProblem
from cli.generate import parse_size
from cli.main import app
from cli.words import describe_video, size_text
from ovi.common.v1 import system_pb2 as system_pb
from ovi.gateway.v1 import gateway_pb2 as pb


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("text", "size"), [("960x544", (960, 544)), (" 544X960 ", (544, 960)), ("96×96", (96, 96)), ("1x2", (1, 2))]
)
def test_a_size_is_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "960", "960x", "x960", "960x-1", "9.5x9", "960x960x3", "1000000x2", "axb"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(UsageProblem, match="--size: got"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps (num_inference_steps): got 0, allowed is 1 to 1000"),
        (["--steps", "10001"], "--steps (num_inference_steps): got 10001"),
        (["--guidance", "nan"], "--guidance (video_guidance_scale): got nan"),
        (["--audio-guidance", "0.5"], "--audio-guidance (audio_guidance_scale): got 0.5"),
        (["--shift", "0"], "--shift (flow_shift): got 0.0"),
        (["--seed", "-1"], "--seed (seed): got -1, allowed is 0 to 4294967295"),
        (["--step-cache", "1.1"], "--step-cache (step_cache_threshold): got 1.1, allowed is 0 (off) to 1"),
        (["--slg-layer", "-3"], "--slg-layer (slg_layer): got -3"),
        (["--size", "wide"], "--size: got 'wide'"),
        (["--image", "no-such-picture.png"], "--image: no-such-picture.png cannot be read"),
        (["--out", "no-such-folder/clip.mp4"], "--out: the folder no-such-folder does not exist"),
        (["--out", "."], "--out: . is a folder"),
        (["--vram-mode", "tiny"], "--vram-mode: got 'tiny', allowed is one of auto, standard, fp8, fp8_offload,"),
        (["--vram-mode", "all_gpu", "--device", "cpu"], "--vram-mode all_gpu needs a GPU"),
        (["--gpus", "5", "--device", "cpu"], "--gpus: got '5', allowed is auto or one of 1, 2, 3, 4, 6"),
        (["--device", "cuda:77"], "--device cuda:77: this machine has"),
        (["--solver", "magic"], "--solver"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_bad_input_ends_with_status_2_and_names_the_flag(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = run("generate", "a bell", *arguments)
    assert status == EXIT_BAD_INPUT
    assert words in output
    assert list(tmp_path.iterdir()) == [], "nothing was started"


def test_every_wrong_flag_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = run("generate", "a bell", "--steps", "0", "--seed", "-1", "--shift", "1000")
    assert status == EXIT_BAD_INPUT
    assert [line.partition(" ")[0] for line in output.splitlines()] == ["--steps", "--shift", "--seed"]


def test_a_picture_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture at all")
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    for name, words in (("text.png", "is no picture"), ("bomb.png", "got 10000x10000 pixels")):
        status, output = run("generate", "a bell", "--image", name)
        assert status == EXIT_BAD_INPUT
        assert output.startswith("--image (image): ") and words in output


def test_a_server_that_is_not_there_is_a_failure_in_words() -> None:
    status, output = run("jobs", "list", "--server", "127.0.0.1:1")
    assert status == EXIT_FAILED
    assert "the gateway at 127.0.0.1:1 cannot be used now" in output and "`ovi up` starts one" in output


def test_an_unknown_state_names_the_known_ones() -> None:
    status, output = run("jobs", "list", "--state", "sleeping")
    assert status == EXIT_BAD_INPUT
    assert "--state: got 'sleeping', allowed is queued, paused, running, completed, failed, cancelled" in output


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (7e12, "7000.0 GB")]
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        (system_pb.VRAM_MODE_UNSPECIFIED, "1.0 kB"),
        (system_pb.VRAM_MODE_STREAMED, "1.0 kB"),
        (system_pb.VRAM_MODE_FP8_OFFLOAD, "lossy (fp8 weights)"),
        (system_pb.VRAM_MODE_ULTRA_LOW, "lossy (int8 weights)"),
    ],
)
def test_a_clip_says_if_its_mode_changed_it(mode: system_pb.VramMode.ValueType, ending: str) -> None:
    text = describe_video(pb.Video(num_bytes=1000, num_frames=121, fps=24, vram_mode=mode))
    assert text.startswith("5.04 s, ") and text.endswith(ending)
