"""The API as a stranger meets it: buf curl by reflection, no local protos."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e.conftest import BUF, RunningStack


def curl(stack: RunningStack, method: str, message: dict[str, Any], cwd: Path) -> list[dict[str, Any]]:
    """The answers of one call."""
    url = f"http://{stack.address}/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(message), url]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90, cwd=cwd)
    assert result.returncode == 0, result.stderr
    answers, decoder, text = [], json.JSONDecoder(), result.stdout.lstrip()
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    return answers


def test_a_job_is_made_watched_and_listed_without_local_protos(stack: RunningStack, tmp_path: Path) -> None:
    (health,) = curl(stack, "grpc.health.v1.Health/Check", {}, tmp_path)
    assert health == {"status": "SERVING"}
    service = "ovi.gateway.v1.JobService"
    parameters = {"prompt": "a bell", "options": {"numInferenceSteps": 2, "seed": "9"}}
    (created,) = curl(stack, f"{service}/CreateJob", {"parameters": parameters}, tmp_path)
    job_id = created["job"]["id"]

    states = [answer["job"] for answer in curl(stack, f"{service}/WatchJob", {"id": job_id}, tmp_path)]
    assert states[-1]["state"] == "JOB_STATE_COMPLETED"
    fractions = [state["progress"].get("fraction", 0) for state in states]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert {"JOB_STAGE_DENOISE", "JOB_STAGE_DECODE"} <= {state["progress"].get("stage") for state in states}

    (read,) = curl(stack, f"{service}/GetJob", {"id": job_id}, tmp_path)
    assert read["job"] == states[-1]
    (listed,) = curl(stack, f"{service}/ListJobs", {"pageSize": 1, "states": ["JOB_STATE_COMPLETED"]}, tmp_path)
    assert [job["id"] for job in listed["jobs"]] == [job_id]
    (models,) = curl(stack, "ovi.gateway.v1.ModelService/ListModels", {}, tmp_path)
    assert "960x960_10s" in [model["id"] for model in models["models"]]

    clip = urllib.request.urlopen(stack.info["http_url"] + states[-1]["video"]["urlPath"], timeout=60).read()
    assert len(clip) == int(states[-1]["video"]["numBytes"])
    assert clip[4:8] == b"ftyp"


def test_every_service_is_described_by_reflection(stack: RunningStack, tmp_path: Path) -> None:
    for name, service in (("text_encoder", "TextEncoder"), ("fusion", "Fusion"), ("vae", "Vae")):
        address = stack.info["services"][name]["address"]
        url = f"http://{address}/ovi.{name}.v1.{service}Service/DescribeModel"
        command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", url]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["device"]


def test_the_http_side_tells_of_health(stack: RunningStack) -> None:
    def read(path: str) -> bytes:
        with urllib.request.urlopen(stack.info["http_url"] + path, timeout=30) as answer:
            assert answer.status == 200
            content: bytes = answer.read()
            return content

    read("/healthz")
    read("/readyz")
    assert b"# TYPE" in read("/metrics")
    health = json.loads(read("/api/health"))
    assert health["engine_loaded"] is True
    assert {"status", "queue_size", "total_jobs"} <= health.keys()
