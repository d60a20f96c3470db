"""The gateway over the real stages: fusion is killed, the job paused, and the clip the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.service_process import ServiceProcess, free_port, running_service

MODEL = "720x720_5s"
STEPS, EVERY = 24, 3


@pytest.fixture(scope="module")
def flags(tiny_checkpoint) -> Iterator[list[str]]:
    """Of a gateway, all stages but fusion running."""
    given = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu")
    with running_service("text_encoder", *given) as text_encoder, running_service("vae", *given) as vae:
        yield ["--text-encoder", text_encoder.address, "--vae", vae.address, "--checkpoint-steps", str(EVERY)]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def fusion(tiny_checkpoint: Path, port: int) -> AbstractContextManager[ServiceProcess]:
    given = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu", "--model", MODEL, "--log-level", "debug")
    return running_service("fusion", *given, port=port)


def latents(gateway: GatewayUnderTest, job_id: str) -> dict[str, torch.Tensor]:
    return load_file(gateway.data_dir / "artifacts" / job_id / "latents.safetensors")


def kept(gateway: GatewayUnderTest, job_id: str) -> Path:
    return gateway.data_dir / "artifacts" / job_id / "denoise.safetensors"


def steps_kept(gateway: GatewayUnderTest, job_id: str) -> int:
    with safe_open(kept(gateway, job_id), framework="pt") as file:
        assert len(file.keys()) == 8, "both latents, and of each three tensors of the solver"
        return int(file.metadata()["steps_done"])


def until_kept(gateway: GatewayUnderTest, job_id: str) -> None:
    """As soon as something is kept; looks at every step."""
    gateway.until(job_id, lambda now: kept(gateway, job_id).is_file())


def steps_logged(service: ServiceProcess) -> list[int]:
    return [entry["index"] for entry in service.log if entry["event"] == "step"]


def metric(gateway: GatewayUnderTest, name: str) -> float:
    lines = httpx.get(f"{gateway.http_url}/metrics", timeout=WAIT_S).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def end_of(gateway: GatewayUnderTest, job_id: str) -> pb.Job:
    """The job's last state, however many watches that takes on a slow machine."""
    while True:
        try:
            return gateway.end_of(job_id)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise


@pytest.mark.timeout(500)
def test_a_job_that_was_cut_and_paused_makes_the_clip_of_an_undisturbed_one(tiny_checkpoint, flags, port, tmp_path):
    with running_gateway(tmp_path / "data", *flags, "--fusion", f"127.0.0.1:{port}") as gateway:
        with fusion(tiny_checkpoint, port) as service:
            whole = gateway.create(model=MODEL, steps=STEPS, seed=5)
            gateway.until(whole.id, lambda now: now.progress.stage == pb.JOB_STAGE_DENOISE and now.progress.done > 0)
            job = gateway.create(model=MODEL, steps=STEPS, seed=5)
            until_kept(gateway, job.id)
            service.process.kill()
            service.process.wait(WAIT_S)
        first = steps_logged(service)[STEPS:]
        saved = steps_kept(gateway, job.id)
        assert saved % (EVERY - 1) == 0 and 0 < saved <= first[-1] <= saved + EVERY
        with fusion(tiny_checkpoint, port) as service:
            gateway.until(job.id, lambda now: now.attempts == 2 and now.progress.done > saved)
            answer = gateway.jobs.PauseJob(pb.PauseJobRequest(id=job.id), timeout=WAIT_S)
            assert answer.job.state == pb.JOB_STATE_PAUSED
            at_pause = steps_kept(gateway, job.id)
            assert steps_logged(service) == list(range(saved + 1, at_pause + 1)), "no step was made in vain"
            gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=WAIT_S)
            end = end_of(gateway, job.id)
            assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 3, end
            assert steps_logged(service) == list(range(saved + 1, STEPS + 1)), "and none was made twice"
            assert end_of(gateway, whole.id).state == pb.JOB_STATE_COMPLETED
        repeated = metric(gateway, "ovi_denoise_steps_repeated_total")
        assert first[-1] - saved - 1 <= repeated <= first[-1] - saved, "the last step may not have been told"
        assert not kept(gateway, job.id).exists()
        for name, value in latents(gateway, whole.id).items():
            assert torch.isfinite(value).all() and torch.equal(latents(gateway, job.id)[name], value)
