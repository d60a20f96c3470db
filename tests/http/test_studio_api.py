"""The studio's contract: REST, and Socket.IO by its own client from npm."""

from __future__ import annotations

import base64
import itertools
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import CheckpointError
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.http.clips import picture, tiny_clip
from tests.http.node import studio_client

_NUMBERS = itertools.count()
OPTIONS = {"resolution": "64x64", "duration": "5s", "steps": 4}


def generation_job(**changes: Any) -> dict[str, Any]:
    """A request as the front end sends it."""
    job = {
        "id": f"client {next(_NUMBERS)}",
        "mode": "t2v",
        "prompt": "a bell",
        "image": None,
        "options": OPTIONS,
        "status": "queued",
        "progress": 0,
        "videoUrl": None,
        "error": None,
        "createdAt": "2026-11-21T10:00:00.000Z",
    }
    return job | changes


def generate(http: httpx.Client, **changes: Any) -> str:
    answer = http.post("/api/generate", json=generation_job(**changes))
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "success" and answer.json()["message"]
    return answer.json()["job_id"]


def end_of(http: httpx.Client, gateway: GatewayUnderTest, label: str) -> dict[str, Any]:
    (job,) = gateway.jobs.ListJobs(pb.ListJobsRequest(label=label), timeout=30).jobs
    gateway.end_of(job.id)
    return http.get(f"/api/jobs/{quote(label, safe='')}").json()


def test_generate_get_list_and_video(http, gateway, stages):
    options = {
        **OPTIONS,
        "resolution": "72x60",
        "seed": 9,
        "videoGuidance": 5,
        "audioGuidance": 2.5,
        "solver": "dpm++",
        "slgLayer": 3,
        "vramMode": "standard",
        "enableLora": False,
        "gpuAllocation": "auto",
        "unknownOption": 1,
    }
    label = generate(http, id="../../etc/passwd", options=options, unknownKey=1)
    assert label == "../../etc/passwd"
    job = end_of(http, gateway, label)
    assert job["status"] == "completed" and job["progress"] == 100 and job["error"] is None
    assert job["id"] == label and job["mode"] == "t2v" and job["prompt"] == "a bell" and job["image"] is None
    assert job["createdAt"] == "2026-11-21T10:00:00.000Z"
    del options["unknownOption"]
    assert job["options"] == options
    assert job["videoUrl"].startswith("/api/videos/job_") and "passwd" not in job["videoUrl"]
    (made,) = gateway.jobs.ListJobs(pb.ListJobsRequest(label=label), timeout=30).jobs
    assert (made.parameters.height, made.parameters.width) == (64, 64), "rounded; what was asked for is told back"
    clip = http.get(job["videoUrl"])
    assert clip.content == tiny_clip() and clip.headers["content-type"] == "video/mp4"
    part = http.get(job["videoUrl"], headers={"Range": "bytes=5-9"})
    assert part.status_code == 206 and part.content == tiny_clip()[5:10]
    assert http.get(f"/api/videos/{quote(label, safe='')}.mp4").content == tiny_clip(), (
        "the label is looked up, it is no path"
    )
    newest = http.get("/api/jobs").json()[-1]
    assert newest == job, "oldest first"
    health = http.get("/api/health").json()
    assert health == {"status": "healthy", "engine_loaded": True, "queue_size": 0, "total_jobs": health["total_jobs"]}
    assert health["total_jobs"] >= 1


def test_a_picture_by_data_url_and_by_upload_id(http, gateway, stages):
    data = picture(64, 64)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    job = end_of(http, gateway, generate(http, mode="i2v", image=url))
    assert job["status"] == "completed" and job["mode"] == "i2v" and len(job["image"]) == 64
    assert stages.vae.pictures[-1][2] == data
    again = end_of(http, gateway, generate(http, mode="i2v", image=job["image"]))
    assert again["status"] == "completed" and again["image"] == job["image"]


def test_the_same_job_again_is_the_same_job(http, gateway):
    label = generate(http, id="twice")
    assert generate(http, id="twice") == label
    end_of(http, gateway, "twice")
    refused = http.post("/api/generate", json=generation_job(id="twice", prompt="another"))
    assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["body", "id"]


def test_a_failed_job_says_why(http, gateway, by_hand):
    label = generate(http)
    by_hand.fusion.next_call().fail(CheckpointError("/c/model.safetensors: truncated"))
    job = end_of(http, gateway, label)
    assert job["status"] == "failed" and "truncated" in job["error"] and job["videoUrl"] is None


def test_delete(http, gateway, by_hand):
    label = generate(http)
    call = by_hand.fusion.next_call()
    assert http.delete(f"/api/jobs/{label}").json()["status"] == "success"
    assert call.ended.wait(10)
    assert http.get(f"/api/jobs/{label}").status_code == 404
    gone = http.delete(f"/api/jobs/{label}")
    assert gone.status_code == 404 and gone.json()["detail"]
    assert http.get("/api/videos/nothing.mp4").status_code == 404


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"id": None}, "id", "missing"),
        ({"id": ""}, "id", "1 to 200"),
        ({"id": "a\x00b"}, "id", "control"),
        ({"id": 7}, "id", "text"),
        ({"mode": "v2v"}, "mode", "t2v"),
        ({"mode": "i2v"}, "image", "missing"),
        ({"image": "data:,x"}, "image", "t2v takes none"),
        ({"mode": "i2v", "image": "https://example.com/x.png"}, "image", "not fetched"),
        ({"mode": "i2v", "image": "nothing"}, "image", "UploadImage"),
        ({"createdAt": None}, "createdAt", "missing"),
        ({"createdAt": "yesterday"}, "createdAt", "ISO 8601"),
        ({"prompt": None}, "prompt", "missing"),
        ({"options": []}, "options", "an object"),
        ({"options": {**OPTIONS, "duration": "10s"}}, "options.duration", "5s"),
        ({"options": {**OPTIONS, "duration": "long"}}, "options.duration", "5s"),
        ({"options": {**OPTIONS, "resolution": "720x720"}}, "options.resolution", "64x64"),
        ({"options": {**OPTIONS, "resolution": "big"}}, "options.resolution", "HEIGHTxWIDTH"),
        ({"options": {**OPTIONS, "solver": "heun"}}, "options.solver", "unipc"),
        ({"options": {**OPTIONS, "steps": 0}}, "options.steps", "1 to 1000"),
        ({"options": {**OPTIONS, "videoGuidance": "much"}}, "options.videoGuidance", "number"),
        ({"options": {**OPTIONS, "slgLayer": 12}}, "options.slgLayer", "11"),
        ({"options": {**OPTIONS, "vramMode": "none"}}, "options.vramMode", "fp8"),
        ({"options": {**OPTIONS, "enableLora": True}}, "options.enableLora", "LoRA"),
        ({"options": {**OPTIONS, "gpuAllocation": "multi_8"}}, "options.gpuAllocation", "single"),
        ({"options": {**OPTIONS, "gpuAllocation": "all"}}, "options.gpuAllocation", "fsdp"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_field(http, changes, field, said):
    refused = http.post("/api/generate", json=generation_job(**changes))
    assert refused.status_code == 422, refused.text
    details = {".".join(detail["loc"][1:]): detail["msg"] for detail in refused.json()["detail"]}
    assert said in details[field], details


@pytest.mark.parametrize("transports", ["websocket", "polling,websocket"])
def test_a_job_by_sockets(gateway, http, by_hand, transports):
    with studio_client(gateway.http_url, transports) as client, studio_client(gateway.http_url) as other:
        job = generation_job(options={**OPTIONS, "steps": 3})
        client.emit("submit_job", job)
        submitted = client.wait("job_submitted", id=job["id"])
        assert submitted["status"] in ("queued", "processing")
        call = by_hand.fusion.next_call()
        client.wait("job_update", id=job["id"], status="processing")
        call.step()
        call.step()
        call.finish()
        for reader in (client, other):
            done = reader.wait("job_update", id=job["id"], status="completed")
            assert set(done) == {"id", "status", "progress", "videoUrl", "error"}
            assert done["progress"] == 100 and done["error"] is None
            assert http.get(done["videoUrl"]).content == tiny_clip()
        told = [data for event, data in client.seen if event == "job_update" and data["id"] == job["id"]]
        assert all(set(update) == {"id", "status", "progress", "videoUrl", "error"} for update in told)
        progress = [update["progress"] for update in told]
        assert progress == sorted(progress) and len(set(progress)) >= 4, "every step was told"
        assert "job_submitted" not in [event for event, data in other.seen], "only the sender is answered"


def test_cancel_by_sockets(gateway, by_hand):
    with studio_client(gateway.http_url) as client:
        job = generation_job()
        client.emit("submit_job", job)
        call = by_hand.fusion.next_call()
        client.emit("cancel_job", {"id": job["id"]})
        client.wait("job_update", id=job["id"], status="cancelled")
        assert call.ended.wait(10)
        client.emit("cancel_job", {"id": job["id"]})
        client.wait("job_cancelled", id=job["id"])


def test_a_client_that_comes_back_is_told_what_it_missed(gateway, by_hand):
    with studio_client(gateway.http_url) as client:
        job = generation_job()
        client.emit("submit_job", job)
        call = by_hand.fusion.next_call()
        client.wait("job_update", id=job["id"], status="processing")
        client.emit("break")
        client.wait("disconnect")
        call.finish()
        client.wait("job_update", id=job["id"], status="completed")


def test_errors_go_to_the_sender(gateway):
    with studio_client(gateway.http_url) as client:
        for event, args, said in (
            ("submit_job", [generation_job(options={**OPTIONS, "duration": "10s"})], "options.duration"),
            ("submit_job", [], "one object"),
            ("submit_job", ["text"], "GenerationJob"),
            ("cancel_job", [{"id": "nobody's"}], "no job"),
            ("cancel_job", [{"id": 5}], "id"),
            ("cancel_job", [None], "id"),
        ):
            client.emit(event, *args)
            assert said in client.wait("error")["message"]


def test_other_origins_only_by_the_list(stages, tmp_path):
    origin = "https://studio.example.com"
    with (
        running_gateway(tmp_path / "data", *stages.flags, "--cors-origins", origin) as gateway,
        httpx.Client(base_url=gateway.http_url, timeout=60) as http,
    ):
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for path in ("/api/generate", "/v1/videos", "/v1/jobs"):
            allowed = http.options(path, headers={"origin": origin, **asked})
            assert allowed.headers["access-control-allow-origin"] == origin
            refused = http.options(path, headers={"origin": "https://evil.example.com", **asked})
            assert "access-control-allow-origin" not in refused.headers
        shaken = http.get("/socket.io/?EIO=4&transport=polling", headers={"origin": origin})
        assert shaken.status_code == 200 and shaken.headers["access-control-allow-origin"] == origin
        assert (
            http.get("/socket.io/?EIO=4&transport=polling", headers={"origin": "https://evil.example.com"}).status_code
            == 400
        )
