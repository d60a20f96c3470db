"""A real fusion service that is killed at random moments, over several jobs: every clip the same, little made again."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.fusion_checkpoint import SMALL, write_variant
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import MODEL, ScriptedTextEncoder, ScriptedVae
from tests.service_process import ServiceProcess, free_port, running_service

STEPS, EVERY = 24, 3
KILLS, JOBS = 6, 3


class Lives:
    """What the services that came one after the other have made of some jobs."""

    def __init__(self, job_ids: list[str]) -> None:
        self._steps: dict[str, list[list[int]]] = {job_id: [] for job_id in job_ids}

    def add(self, service: ServiceProcess) -> None:
        """A service, when it has ended."""
        for job_id, lives in self._steps.items():
            of_job = [entry for entry in service.log if entry["event"] == "step" and entry["request_id"] == job_id]
            if of_job:
                lives.append([entry["index"] for entry in of_job])

    def check(self) -> None:
        """Each began no more steps behind the furthest than a cut may cost."""
        assert sum(len(lives) - 1 for lives in self._steps.values()) >= KILLS // 2, "most kills cut a denoise"
        for lives in self._steps.values():
            furthest = 0
            for steps in lives:
                assert steps == list(range(steps[0], steps[-1] + 1))
                assert furthest - EVERY < steps[0] <= furthest + 1, lives
                furthest = max(furthest, steps[-1])
            assert furthest == STEPS
            assert sum(map(len, lives)) <= STEPS + EVERY * (len(lives) - 1)


@pytest.fixture(scope="module")
def fusion_flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("fusion")
    write_variant(folder, MODEL, config=replace(SMALL, text_dim=32, num_layers=12), seed=1)
    return ["--checkpoints", str(folder), "--device", "cpu", "--log-level", "debug", "--grace-s", "1"]


@pytest.fixture
def stage_flags() -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        stages = [ScriptedTextEncoder(), ScriptedVae()]
        for stage in stages:
            stack.callback(stage.close)
        yield ["--text-encoder", stages[0].address, "--vae", stages[1].address]


def latents(gateway: GatewayUnderTest, job_id: str) -> dict[str, torch.Tensor]:
    return load_file(gateway.data_dir / "artifacts" / job_id / "latents.safetensors")


def kept_steps(gateway: GatewayUnderTest, job_ids: list[str]) -> int:
    """Steps of all jobs that are not made again, whatever happens now."""
    total = 0
    for job_id in job_ids:
        folder = gateway.data_dir / "artifacts" / job_id
        if (folder / "latents.safetensors").is_file():
            total += STEPS
        else:
            # A checkpoint that is put in another's place meanwhile is not missed: the next look sees it.
            with (
                contextlib.suppress(FileNotFoundError, SafetensorError),
                safe_open(folder / "denoise.safetensors", "pt") as file,
            ):
                total += int((file.metadata() or {})["steps_done"])
    return total


def until_more_is_kept(gateway: GatewayUnderTest, job_ids: list[str], before: int) -> int:
    """As soon as it is; nobody tells of it. A job that is cut again and again with nothing new kept is given up."""
    deadline_s = time.monotonic() + WAIT_S
    while (now := kept_steps(gateway, job_ids)) <= before:
        assert time.monotonic() < deadline_s, f"no more than {before} steps are kept"
        time.sleep(0.01)
    return now


def completed(gateway: GatewayUnderTest, ids: list[str]) -> None:
    for job_id in ids:
        end = gateway.end_of(job_id)
        warnings = [entry for entry in gateway.service.log if entry.get("level") == "warning"]
        assert end.state == pb.JOB_STATE_COMPLETED, (end.error, [str(entry)[:300] for entry in warnings])


def some_jobs(gateway: GatewayUnderTest) -> list[str]:
    return [gateway.create(steps=STEPS, seed=seed).id for seed in range(JOBS)]


@pytest.mark.timeout(400)
def test_kills_at_random_moments_cost_little_and_change_nothing(fusion_flags, stage_flags, tmp_path):
    chance, port = random.Random(20), free_port()
    flags = (*stage_flags, "--fusion", f"127.0.0.1:{port}", "--checkpoint-steps", str(EVERY))
    with running_gateway(tmp_path / "data", *flags) as gateway:
        with running_service("fusion", *fusion_flags, port=port):
            undisturbed = some_jobs(gateway)
            completed(gateway, undisturbed)
        ids = some_jobs(gateway)
        lives, num_kept = Lives(ids), 0
        for _ in range(KILLS):
            with running_service("fusion", *fusion_flags, port=port) as service:
                # At least as much as a cut costs, so that the jobs come to an end; then at any time within a step.
                service.wait_logged("step", count=chance.randint(EVERY + 1, 3 * EVERY))
                num_kept = until_more_is_kept(gateway, ids, num_kept)
                time.sleep(chance.uniform(0.0, 0.05))
                service.process.kill()
                service.process.wait(WAIT_S)
            lives.add(service)
        with running_service("fusion", *fusion_flags, port=port) as service:
            completed(gateway, ids)
        lives.add(service)
        lives.check()
        for one, other in zip(undisturbed, ids, strict=True):
            assert gateway.download(one) == gateway.download(other)
            for name, value in latents(gateway, one).items():
                assert torch.isfinite(value).all() and torch.equal(latents(gateway, other)[name], value)
