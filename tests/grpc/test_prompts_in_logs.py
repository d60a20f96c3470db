"""What people write stays out of the logs, unless it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import httpx
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import CheckpointError
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages, scripted_stages

SECRET = "xylophone zeppelin quagmire"


@pytest.fixture(scope="module")
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


def everything_with(gateway: GatewayUnderTest, stages: ScriptedStages) -> None:
    """Jobs that end well, fail, are cancelled and are refused, in several ways, all with the secret in their texts."""
    texts = {"prompt": SECRET, "video_negative_prompt": f"no {SECRET}", "audio_negative_prompt": f"less {SECRET}"}
    assert gateway.end_of(gateway.create(**texts).id).state == pb.JOB_STATE_COMPLETED
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    stages.fusion.automatic = False
    failing = gateway.create(**texts)
    stages.fusion.next_call().fail(CheckpointError("the weights are damaged"))
    assert gateway.end_of(failing.id).state == pb.JOB_STATE_FAILED
    stages.fusion.automatic = True
    for wrong in (
        {"prompt": SECRET * 500},
        {"prompt": SECRET, "model": SECRET},
        {"prompt": SECRET, "image_id": SECRET},
        {"prompt": f"{SECRET}\a"},
        {"prompt": SECRET, "request_id": SECRET},
        {"prompt": SECRET, "request_id": "once", "seed": 8},
        {"prompt": SECRET, "request_id": "once", "seed": 9},
    ):
        try:
            gateway.end_of(gateway.create(**wrong).id)
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS)
    rows = [pb.GenerationParameters(prompt=SECRET), pb.GenerationParameters(prompt=SECRET, model=SECRET)]
    with pytest.raises(grpc.RpcError):
        gateway.jobs.BatchCreate(pb.BatchCreateRequest(requests=rows), timeout=WAIT_S)
    with httpx.Client(base_url=gateway.http_url, timeout=WAIT_S) as client:
        made = client.post("/v1/videos", json={"prompt": SECRET})
        assert made.status_code == 200
        gateway.end_of(made.json()["id"])
        client.post("/v1/videos", json={"prompt": SECRET, "size": SECRET})
        client.post("/v1/videos", json={"prompt": [SECRET]})
        client.post("/v1/videos", content=f"{{{SECRET}", headers={"content-type": "application/json"})
        client.post("/v1/jobs", json={"prompt": SECRET, "parameters": {"prompt": SECRET}})
        client.post("/api/generate", json={"id": "a", "mode": "t2v", "prompt": SECRET, "createdAt": SECRET})


def test_no_prompt_is_logged(stages, tmp_path):
    with running_gateway(tmp_path / "data", *stages.flags, "--log-level", "info") as gateway:
        everything_with(gateway, stages)
    created = [entry for entry in gateway.service.log if entry["event"] == "job created"]
    assert len(created) >= 4, "the log was read to its end"
    for entry in gateway.service.log:
        assert not any(word in json.dumps(entry) for word in SECRET.split()), entry


def test_prompts_are_logged_if_asked_for(stages, tmp_path):
    with running_gateway(tmp_path / "data", *stages.flags, "--log-prompts") as gateway:
        job = gateway.end_of(gateway.create(prompt=SECRET).id)
    created = [entry for entry in gateway.service.log if entry["event"] == "job created"]
    assert [(entry["job_id"], entry["prompt"]) for entry in created] == [(job.id, SECRET)]
