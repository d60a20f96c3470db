"""`ovi jobs`, `ovi generate` and `ovi doctor` against a running stack."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.e2e.conftest import MANY_STEPS, OVI, SERVICES, RunningStack
from tests.service_process import free_port


def ovi(cwd: Path, *arguments: str | Path, status: int = 0) -> str:
    """Standard output of a command that ends with `status`; of a failing one, standard error."""
    command = [str(argument) for argument in (OVI, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if status else result.stdout


def as_json(text: str) -> list[dict[str, Any]]:
    """One object a line."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def finished(stack: RunningStack) -> pb.Job:
    """A completed job."""
    job = stack.finished(stack.create("a finished job", seed=31).id)
    assert job.state == pb.JOB_STATE_COMPLETED, job
    return job


def test_jobs_are_listed_and_shown(stack: RunningStack, finished: pb.Job, tmp_path: Path) -> None:
    server = ("--server", stack.address)
    assert finished.id in ovi(tmp_path, "jobs", "list", *server)
    listed = as_json(ovi(tmp_path, "jobs", "list", "--json", "--state", "completed", *server))
    assert finished.id in [job["id"] for job in listed]
    assert {job["state"] for job in listed} == {"JOB_STATE_COMPLETED"}
    assert len(as_json(ovi(tmp_path, "jobs", "list", "--json", "--limit", "1", *server))) == 1

    (shown,) = as_json(ovi(tmp_path, "jobs", "show", finished.id, "--json", *server))
    assert shown["parameters"]["options"]["seed"] == "31"
    text = ovi(tmp_path, "jobs", "show", finished.id, *server)
    assert "a finished job" in text and "seed 31" in text and "completed" in text


def test_a_job_is_watched_to_its_end(stack: RunningStack, tmp_path: Path) -> None:
    job = stack.create("to be watched")
    states = as_json(ovi(tmp_path, "jobs", "watch", job.id, "--json", "--server", stack.address))
    assert states[-1]["state"] == "JOB_STATE_COMPLETED"
    assert {state["id"] for state in states} == {job.id}
    assert "decode" in ovi(tmp_path, "jobs", "watch", job.id, "--server", stack.address)


def test_a_clip_is_downloaded_whole(stack: RunningStack, finished: pb.Job, tmp_path: Path) -> None:
    ovi(tmp_path, "jobs", "download", finished.id, "--server", stack.address)
    (clip,) = tmp_path.iterdir()
    assert clip.name == f"{finished.id}.mp4"
    assert clip.stat().st_size == finished.video.num_bytes
    ovi(tmp_path, "jobs", "download", finished.id, "-o", "other.mp4", "--server", stack.address)
    assert (tmp_path / "other.mp4").read_bytes() == clip.read_bytes()


def test_a_table_is_queued_and_its_jobs_are_set_aside_and_resumed(stack: RunningStack, tmp_path: Path) -> None:
    server = ("--server", stack.address)
    table = tmp_path / "table.csv"
    table.write_text('text_prompt\n"a dog, far away"\na cat\n')
    flags = ("--samples", "2", "--seed", "5", "--steps", "200", "--priority", "0")
    (made,) = as_json(ovi(tmp_path, "jobs", "batch", str(table), *flags, "--json", *server))
    shown = [as_json(ovi(tmp_path, "jobs", "show", job_id, "--json", *server))[0] for job_id in made["job_ids"]]
    seeds = [(job["parameters"]["prompt"], job["parameters"]["options"]["seed"]) for job in shown]
    assert seeds == [("a dog, far away", "5"), ("a dog, far away", "6"), ("a cat", "5"), ("a cat", "6")]
    last = made["job_ids"][-1]
    assert "is paused" in ovi(tmp_path, "jobs", "pause", last, *server)
    assert "is queued" in ovi(tmp_path, "jobs", "resume", last, *server)
    for job_id in made["job_ids"]:
        ovi(tmp_path, "jobs", "cancel", job_id, *server)


def test_a_job_is_cancelled_then_deleted(stack: RunningStack, tmp_path: Path) -> None:
    server = ("--server", stack.address)
    job = stack.create("to be deleted", steps=MANY_STEPS)
    stack.denoising(job.id, steps=1)
    assert "FAILED_PRECONDITION" in ovi(tmp_path, "jobs", "delete", job.id, *server, status=1)
    assert "is running" in ovi(tmp_path, "jobs", "download", job.id, *server, status=1)
    ovi(tmp_path, "jobs", "cancel", job.id, *server)
    ovi(tmp_path, "jobs", "watch", job.id, *server, status=1)
    ovi(tmp_path, "jobs", "delete", job.id, *server)
    assert job.id in ovi(tmp_path, "jobs", "show", job.id, *server, status=2)
    assert not [path for path in stack.data_dir.rglob("*") if job.id in str(path)]


def test_generate_uses_the_stack_that_runs_on_its_data_folder(stack: RunningStack, tmp_path: Path) -> None:
    data = ("--data-dir", stack.data_dir)
    output = ovi(tmp_path, "generate", "a bell", "--steps", "1", *data)
    assert f"({stack.address})" in output and (tmp_path / "clip.mp4").stat().st_size > 0
    refused = ovi(tmp_path, "generate", "a bell", "--preset", "tiny", *data, status=2)
    assert f"--server {stack.address}" in refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((" ",), "PROMPT (parameters.prompt): got 0 characters"),
        (("a bell", "--size", "4000x4000"), "--size (parameters.height): got 4000x4000"),
        (("a bell", "--model", "huge"), "--model (parameters.model): got 'huge'"),
        (("a bell", "--slg-layer", "4000"), "--slg-layer (parameters.options.slg_layer): got 4000"),
    ],
)
def test_what_only_the_gateway_knows_is_refused_by_flag(
    stack: RunningStack, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert words in ovi(tmp_path, "generate", *arguments, "--server", stack.address, status=2)
    assert list(tmp_path.iterdir()) == []


def test_doctor_knows_the_running_stack(stack: RunningStack, tmp_path: Path) -> None:
    arguments = ("--data-dir", stack.data_dir, "--checkpoints", stack.info["checkpoints"], "--json")
    findings = {finding["subject"]: finding for finding in as_json(ovi(tmp_path, "doctor", *arguments))}
    assert stack.address in findings["stack"]["state"]
    assert findings["weights"]["verdict"] == "good", findings["weights"]
    assert findings["Python"]["verdict"] == "good"


def test_doctor_says_what_keeps_a_stack_from_starting(stack: RunningStack, tmp_path: Path) -> None:
    port = stack.address.rpartition(":")[2]
    arguments = ("--grpc-port", port, "--checkpoints", tmp_path / "nothing", "--json")
    command = [str(argument) for argument in (OVI, "doctor", *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert result.returncode == 1
    findings = {finding["subject"]: finding for finding in as_json(result.stdout)}
    assert findings[f"port {port}"]["verdict"] == "bad"
    assert "--grpc-port" in findings[f"port {port}"]["advice"]
    assert findings["weights"]["verdict"] == "bad"


def test_health_of_every_service_is_an_exit_status(stack: RunningStack, tmp_path: Path) -> None:
    for name in SERVICES:
        address = stack.info["services"][name]["address"]
        assert ovi(tmp_path, "health", address).strip() == "SERVING"
    assert "NOT_FOUND" in ovi(tmp_path, "health", address, "--service", "ovi.gateway.v1.Nothing", status=1)
    assert "UNAVAILABLE" in ovi(tmp_path, "health", f"127.0.0.1:{free_port()}", "--timeout-s", "1", status=1)
