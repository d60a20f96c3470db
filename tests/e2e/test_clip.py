"""A prompt in, a clip out: what the README promises."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from ovi.common.v1 import generation_pb2 as common_pb
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.vae.v1 import vae_pb2
from shared.tensors.transport import TensorResolver
from tests.e2e.conftest import OVI, Program, RunningStack

PROMPT = "A lighthouse keeper says <S>the storm is coming<E>. Audio: wind & waves"


def probe(ffprobe: Path, clip: Path) -> dict[str, Any]:
    """What ffprobe says, with every frame counted by decoding it."""
    arguments = ["-v", "error", "-count_frames", "-show_format", "-show_streams", "-of", "json"]
    result = subprocess.run([ffprobe, *arguments, clip], capture_output=True, check=True, timeout=60)
    assert result.stderr == b"", "ffprobe found nothing to complain about"
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def check_clip(found: dict[str, Any], *, frames: int, seconds: float) -> None:
    """H.264 yuv420p at 24 fps and AAC, both as long as the clip."""
    video = next(stream for stream in found["streams"] if stream["codec_type"] == "video")
    audio = next(stream for stream in found["streams"] if stream["codec_type"] == "audio")
    assert (video["codec_name"], video["pix_fmt"], video["r_frame_rate"]) == ("h264", "yuv420p", "24/1")
    assert int(video["nb_read_frames"]) == frames
    assert float(video["duration"]) == pytest.approx(seconds, abs=0.005)
    assert audio["codec_name"] == "aac"
    # The sound is cut to the video's length, though AAC comes in frames of 64 ms: an edit list hides the rest.
    assert float(audio["duration"]) == pytest.approx(seconds, abs=0.005)
    assert float(found["format"]["duration"]) == pytest.approx(seconds, abs=0.005)


@pytest.mark.timeout(400)
def test_generate_makes_a_clip_with_nothing_running(
    program: Callable[..., Program], tmp_path: Path, ffprobe: Path
) -> None:
    """The README's command at its default 50 steps, with a stack of its own."""
    command = program(OVI, "generate", PROMPT, "--seed", "4711", "-o", "clip.mp4")
    assert command.wait(timeout_s=380) == 0, command.output
    assert "clip.mp4" in command.output.splitlines()[-1]
    assert "Traceback" not in command.output

    found = probe(ffprobe, tmp_path / "clip.mp4")
    check_clip(found, frames=121, seconds=121 / 24)
    tags = found["format"]["tags"]
    assert (tags["prompt"], tags["seed"], tags["model"]) == (PROMPT, "4711", "720x720_5s")
    assert json.loads(tags["settings"])["num_inference_steps"] == "50"
    assert not list(tmp_path.glob(".clip.mp4*")), "no partial file is left"
    assert not (tmp_path / "data" / "stack.json").exists(), "the stack has stopped"


def latents(stack: RunningStack, job: pb.Job) -> dict[str, Any]:
    """The kept latents of a finished job."""
    (file,) = [path for path in stack.data_dir.rglob("*.safetensors") if job.id in str(path)]
    return load_file(file)


def test_the_same_seed_gives_the_same_latents_and_another_seed_others(stack: RunningStack) -> None:
    ids = [stack.create(PROMPT, steps=3, seed=seed).id for seed in (5, 5, 6)]
    jobs = [stack.finished(job_id) for job_id in ids]
    assert [job.state for job in jobs] == [pb.JOB_STATE_COMPLETED] * 3, jobs
    first, second, other = (latents(stack, job) for job in jobs)
    assert first.keys() == second.keys() and len(first) == 2
    for name in first:
        assert first[name].isfinite().all()
        assert first[name].equal(second[name])
        assert not first[name].equal(other[name])
    assert {tuple(tensor.shape) for tensor in first.values()} == {(48, 31, 6, 6), (157, 20)}


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gradient, larger than the frame and of another aspect."""
    path = tmp_path_factory.mktemp("picture") / "first.png"
    gradient = Image.linear_gradient("L").resize((300, 200))
    Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient)).save(path)
    return path


def encode_picture(stack: RunningStack, picture: Path, job: pb.Job) -> Any:
    """The latent of the picture at the job's size, straight from the VAE service."""
    size = common_pb.Size(height=job.parameters.height, width=job.parameters.width)
    parts = [vae_pb2.EncodeImageRequest(size=size), vae_pb2.EncodeImageRequest(chunk=picture.read_bytes())]
    reference = stack.vae.EncodeImage(iter(parts), timeout=60).latent
    resolver = TensorResolver.over_grpc()
    try:
        return resolver.fetch(reference, field="latent", max_bytes=1 << 24)
    finally:
        resolver.release(reference)
        resolver.close()


def test_a_first_picture_is_the_first_latent_frame(
    stack: RunningStack, picture: Path, program: Callable[..., Program], tmp_path: Path, ffprobe: Path
) -> None:
    arguments = ("--image", picture, "--steps", "2", "--server", stack.address)
    command = program(OVI, "generate", "the sun rises", *arguments)
    assert command.wait() == 0, command.output
    job_id = command.line_with("job ").split()[1]
    job = next(iter(stack.watch(job_id)))
    assert job.parameters.width > job.parameters.height, "without a size the picture's aspect is taken"

    kept = latents(stack, job)
    (video,) = [tensor for tensor in kept.values() if tensor.dim() == 4]
    assert video[:, :1].equal(encode_picture(stack, picture, job))
    assert not video[:, 1:2].equal(video[:, :1])
    check_clip(probe(ffprobe, tmp_path / "clip.mp4"), frames=121, seconds=121 / 24)


def test_the_ten_second_variant_makes_ten_seconds(
    stack: RunningStack, program: Callable[..., Program], tmp_path: Path, ffprobe: Path
) -> None:
    arguments = ("--model", "960x960_10s", "--steps", "1", "--server", stack.address, "-o", "long.mp4")
    command = program(OVI, "generate", PROMPT, *arguments)
    assert command.wait() == 0, command.output
    check_clip(probe(ffprobe, tmp_path / "long.mp4"), frames=241, seconds=241 / 24)
