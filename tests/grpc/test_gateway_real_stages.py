"""The gateway over the real stages and the tiny checkpoint: what the scripted stages stand for, once for real."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import grpc
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ovi.common.v1 import system_pb2
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from shared.tensors.transport import TensorResolver
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway, violations_of
from tests.service_process import ServiceProcess, running_service

STAGES = ("text_encoder", "fusion", "vae")
MODEL = "720x720_5s"


@dataclass
class RealStages:
    """Running stage processes."""

    text_encoder: ServiceProcess
    fusion: ServiceProcess
    vae: ServiceProcess

    @property
    def flags(self) -> list[str]:
        return [part for name in STAGES for part in (f"--{name.replace('_', '-')}", getattr(self, name).address)]

    def num_encoded(self) -> int:
        with self.text_encoder.channel() as channel:
            stub = text_encoder_pb2_grpc.TextEncoderServiceStub(channel)
            return stub.DescribeModel(text_encoder_pb2.DescribeModelRequest(), timeout=30).num_encoded

    def num_denoising(self) -> int:
        with self.fusion.channel() as channel:
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            return stub.DescribeModel(fusion_pb2.DescribeModelRequest(), timeout=30).num_pending


@pytest.fixture(scope="module")
def stages(tiny_checkpoint) -> Iterator[RealStages]:
    flags = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu")
    with (
        running_service("text_encoder", *flags) as text_encoder,
        running_service("fusion", *flags, "--model", MODEL) as fusion,
        running_service("vae", *flags) as vae,
    ):
        yield RealStages(text_encoder, fusion, vae)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gateway") / "data"


@pytest.fixture(scope="module")
def gateway(stages, data_dir) -> Iterator[GatewayUnderTest]:
    with running_gateway(data_dir, *stages.flags) as gateway:
        yield gateway


def latents(data_dir: Path, job_id: str) -> dict[str, torch.Tensor]:
    return load_file(data_dir / "artifacts" / job_id / "latents.safetensors")


def test_clip_of_a_prompt(gateway, data_dir):
    prompt = "A fox says <S>good morning<E>. <AUDCAP>birds<ENDAUDCAP>"
    first, second = (gateway.create(model=MODEL, steps=2, seed=3, prompt=prompt) for _ in range(2))
    ends = [gateway.end_of(job.id) for job in (first, second)]
    for end in ends:
        assert end.state == pb.JOB_STATE_COMPLETED, end.error
    clip, end = gateway.download(first.id), ends[0]
    with av.open(io.BytesIO(clip)) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.height, video.width) == (end.parameters.height, end.parameters.width)
        assert sum(1 for _ in file.decode(video)) == 121 == end.video.num_frames
    assert len(clip) == end.video.num_bytes
    one, two = latents(data_dir, first.id), latents(data_dir, second.id)
    for name in ("video_latent", "audio_latent"):
        assert torch.isfinite(one[name]).all()
        assert torch.equal(one[name], two[name]), "one seed, one result"


def test_a_lossless_mode_gives_the_same_clip_and_a_lossy_one_says_that_it_is_not(gateway, data_dir):
    """Streaming copies the same values in; int8 rounds every wide layer, which 2 steps cannot hide."""
    modes = (system_pb2.VRAM_MODE_UNSPECIFIED, system_pb2.VRAM_MODE_STREAMED, system_pb2.VRAM_MODE_ULTRA_LOW)
    ends = [gateway.end_of(gateway.create(model=MODEL, steps=2, seed=3, vram_mode=mode).id) for mode in modes]
    assert [end.state for end in ends] == [pb.JOB_STATE_COMPLETED] * 3, [end.error for end in ends]
    assert [end.video.vram_mode for end in ends] == [system_pb2.VRAM_MODE_STANDARD, *modes[1:]]
    resident, streamed, rounded = (latents(data_dir, end.id)["video_latent"] for end in ends)
    assert torch.equal(resident, streamed) and not torch.equal(resident, rounded)
    assert torch.isfinite(rounded).all()


def test_a_mode_that_the_service_cannot_have_is_refused_before_queueing(gateway):
    with pytest.raises(grpc.RpcError) as refused:
        gateway.create(model=MODEL, vram_mode=system_pb2.VRAM_MODE_ALL_GPU)
    assert "CPU" in violations_of(refused.value)["parameters.vram_mode"]


def test_devices_are_those_of_this_machine(gateway):
    devices = gateway.system.GetDevices(system_pb2.GetDevicesRequest(), timeout=30).devices
    (host,) = [device for device in devices if device.backend == "cpu"]
    assert host.total_bytes == psutil.virtual_memory().total and host.own_bytes > 0


def test_first_latent_frame_is_the_picture(gateway, stages, data_dir):
    picture = io.BytesIO()
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 40).convert("RGB").save(picture, "PNG")
    uploaded = gateway.upload(picture.getvalue())
    job = gateway.end_of(gateway.create(model=MODEL, steps=2, image_id=uploaded.image_id).id)
    assert job.state == pb.JOB_STATE_COMPLETED, job.error
    size = vae_pb2.EncodeImageRequest()
    size.size.height, size.size.width = job.parameters.height, job.parameters.width
    parts = iter([size, vae_pb2.EncodeImageRequest(chunk=picture.getvalue())])
    with stages.vae.channel() as channel:
        encoded = vae_pb2_grpc.VaeServiceStub(channel).EncodeImage(parts, timeout=60).latent
    resolver = TensorResolver.over_grpc()
    expected = resolver.fetch(encoded, field="latent", max_bytes=1 << 24)
    resolver.close()
    assert torch.equal(latents(data_dir, job.id)["video_latent"][:, :1], expected)


def test_cancelled_denoise_leaves_the_device_idle(gateway, stages):
    job = gateway.create(model=MODEL, steps=1000)
    gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_DENOISE and now.progress.done >= 1)
    assert gateway.cancel(job.id).state == pb.JOB_STATE_CANCELLED
    after = gateway.end_of(gateway.create(model=MODEL, steps=1).id)
    assert after.state == pb.JOB_STATE_COMPLETED, "the device took the next job, so it had stopped"
    assert stages.num_denoising() == 0


def test_killed_gateway_finishes_the_job_without_encoding_again(stages, tmp_path):
    with running_gateway(tmp_path / "data", *stages.flags) as gateway:
        job = gateway.create(model=MODEL, steps=6, prompt="a prompt that no other test has")
        gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_DENOISE and now.progress.done >= 1)
        encoded = stages.num_encoded()
        gateway.service.process.kill()
        gateway.service.process.wait(30)
    with running_gateway(tmp_path / "data", *stages.flags) as gateway:
        end = gateway.end_of(job.id)
        assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2, end.error
    assert stages.num_encoded() == encoded


def test_what_the_real_stages_refuse_is_refused_before_queueing(gateway):
    models = gateway.models.ListModels(pb.ListModelsRequest(), timeout=30).models
    assert MODEL in [model.id for model in models]
    with pytest.raises(grpc.RpcError) as refused:
        gateway.create(model=MODEL, height=960, width=960)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "nearest" in refused.value.details()
