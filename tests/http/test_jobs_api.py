"""The native REST API: jobs, event streams, batches, pictures, models."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.grpc.scripted_stages import MODEL, NUM_FRAMES
from tests.http.clips import picture, tiny_clip


def create(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/jobs", json={"prompt": "a bell", "num_inference_steps": 3} | fields)
    assert answer.status_code == 201, answer.text
    return answer.json()


def events_of(http: httpx.Client, job_id: str, last_event_id: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, job) of every event."""
    headers = {"last-event-id": last_event_id} if last_event_id else {}
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif "data" in event:
                assert event["event"] == "job"
                yield event["id"], json.loads(event["data"])
                event = {}


def end_of(http: httpx.Client, job_id: str) -> dict[str, Any]:
    return list(events_of(http, job_id))[-1][1]


def wrong_fields(answer: httpx.Response) -> dict[str, str]:
    assert answer.status_code == 400, answer.text
    return {violation["field"]: violation["description"] for violation in answer.json()["error"]["violations"]}


def test_a_job_from_creation_to_its_files(http):
    created = http.post("/v1/jobs", json={"prompt": "  a \n bell ", "seed": 3, "label": "mine", "priority": 7})
    assert created.status_code == 201 and created.headers["location"] == f"/v1/jobs/{created.json()['id']}"
    job = created.json()
    assert job["state"] in ("queued", "running") and job["label"] == "mine" and job["priority"] == 7
    parameters = job["parameters"]
    assert (parameters["prompt"], parameters["model"], parameters["seed"]) == ("a bell", MODEL, 3)
    assert (parameters["height"], parameters["width"], parameters["num_frames"]) == (64, 64, NUM_FRAMES)
    assert parameters["num_inference_steps"] == 50 and parameters["solver"] == "unipc"
    end = end_of(http, job["id"])
    assert end["state"] == "completed" and end["progress"]["fraction"] == 1 and end["attempts"] == 1
    assert end["create_time"] <= end["start_time"] <= end["end_time"] and set(end["stage_seconds"]) >= {"denoise"}
    assert end["video"]["num_bytes"] == len(tiny_clip()) and end["error"] is None
    assert http.get(end["video"]["url_path"]).content == tiny_clip()
    clip = http.get(f"/v1/jobs/{job['id']}/video")
    assert clip.content == tiny_clip() and clip.headers["accept-ranges"] == "bytes"
    assert http.get(f"/v1/jobs/{job['id']}/thumbnail").headers["content-type"] == "image/webp"
    assert http.get(f"/v1/jobs/{job['id']}/spritesheet").headers["content-type"] == "image/jpeg"
    assert http.get(f"/v1/jobs/{job['id']}").json() == end
    assert http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head(http):
    """Which takes 40 ms, from about the tenth request of a connection on."""
    taken = [http.get("/v1/jobs", params={"limit": 1}).elapsed.total_seconds() for _ in range(60)]
    assert statistics.median(taken) < 0.035


def test_events_tell_every_step_and_end_with_the_job(http, by_hand):
    job = create(http)
    call = by_hand.fusion.next_call()
    events = events_of(http, job["id"])
    first_id, first = next(events)
    assert first["state"] == "running"
    for number in (1, 2):
        call.step()
        assert next(told for _, told in events if told["progress"]["done"] == number)
    call.finish()
    rest = list(events)
    assert rest[-1][1]["state"] == "completed" and rest[-1][0] == "end" and first_id != "end"
    assert len({event_id for event_id, _ in rest}) == len(rest)


def test_a_reader_goes_on_behind_the_last_event_it_saw(http, by_hand):
    job = create(http)
    call = by_hand.fusion.next_call()
    watching = events_of(http, job["id"])
    seen_id = next(event_id for event_id, told in watching if told["progress"]["stage"] == "denoise")
    watching.close()
    call.step()
    call.step()
    with_others = events_of(http, job["id"])
    next(told for _, told in with_others if told["progress"]["done"] == 2)
    replayed = events_of(http, job["id"], seen_id)
    again: list[int] = []
    while 2 not in again:
        event_id, told = next(replayed)
        assert event_id != seen_id
        again.append(told["progress"]["done"])
    assert [done for done in again if done] == [1, 2], "what was missed comes again"
    call.finish()
    assert list(replayed)[-1][0] == "end"
    list(with_others)
    unknown = list(events_of(http, job["id"], "another-7"))
    assert len(unknown) == 1 and unknown[0][1]["state"] == "completed", "an id of another process: the present state"
    assert http.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": "end"}).status_code == 204


def test_list_filters_and_pages(http):
    ids = [create(http, label="listed")["id"] for _ in range(5)]
    for job_id in ids:
        end_of(http, job_id)
    seen: list[str] = []
    token = ""
    while True:
        page = http.get("/v1/jobs", params={"label": "listed", "limit": 2, "page_token": token}).json()
        seen += [job["id"] for job in page["jobs"]]
        token = page["next_page_token"]
        if not token:
            break
    assert seen == ids[::-1]
    oldest = http.get("/v1/jobs", params={"label": "listed", "order": "asc", "state": ["completed", "failed"]}).json()
    assert [job["id"] for job in oldest["jobs"]] == ids
    assert http.get("/v1/jobs", params={"label": "listed", "state": "failed"}).json()["jobs"] == []
    for params in ({"limit": 0}, {"limit": 1001}, {"page_token": "x"}, {"state": "done"}, {"order": "up"}):
        assert wrong_fields(http.get("/v1/jobs", params=params))


def test_cancel_pause_and_resume(http, by_hand):
    job = create(http)
    call = by_hand.fusion.next_call()
    with ThreadPoolExecutor(1) as threads:
        pausing = threads.submit(http.post, f"/v1/jobs/{job['id']}/pause")
        assert by_hand.fusion.pauses.get(timeout=60) == job["id"]
        call.pause()
        assert pausing.result().json()["state"] == "paused"
    assert call.ended.wait(10)
    assert http.post(f"/v1/jobs/{job['id']}/resume").json()["state"] in ("queued", "running")
    call = by_hand.fusion.next_call()
    refused = http.delete(f"/v1/jobs/{job['id']}")
    assert refused.status_code == 409 and "cancel it" in refused.json()["error"]["message"]
    assert http.post(f"/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    assert call.ended.wait(10)
    assert http.post(f"/v1/jobs/{job['id']}/resume").status_code == 409
    assert http.get(f"/v1/jobs/{job['id']}/video").json()["error"]["code"] == "video_not_ready"


def test_a_request_id_or_an_idempotency_key_makes_one_job(http):
    first = create(http, request_id="rest-once")
    assert create(http, request_id="rest-once")["id"] == first["id"]
    body = {"prompt": "a bell", "num_inference_steps": 3}
    assert http.post("/v1/jobs", json=body, headers={"idempotency-key": "rest-once"}).json()["id"] == first["id"]
    clash = http.post("/v1/jobs", json=body | {"seed": 1}, headers={"idempotency-key": "rest-once"})
    assert clash.status_code == 409 and clash.json()["error"]["code"] == "already_exists"
    both = http.post("/v1/jobs", json=body | {"request_id": "a"}, headers={"idempotency-key": "b"})
    assert "request_id" in wrong_fields(both)
    assert wrong_fields(http.post("/v1/jobs", json=body, headers={"idempotency-key": "k" * 256}))
    end_of(http, first["id"])


def test_everything_wrong_is_said_at_once(http):
    body = {
        "prompt": "\x00",
        "model": "nonesuch",
        "height": 64,
        "image_id": "../../etc/passwd",
        "slg_layer": 4000,
    }
    assert set(wrong_fields(http.post("/v1/jobs", json=body))) == {
        "prompt",
        "model",
        "width",
        "image_id",
    }
    body = {"prompt": "", "num_inference_steps": 0, "video_guidance_scale": "NaN", "seed": -1, "nonsense": 1}
    assert set(wrong_fields(http.post("/v1/jobs", json=body))) == set(body)
    for content in (b'{"prompt": "\\ud800"}', b"{"):
        assert wrong_fields(http.post("/v1/jobs", content=content, headers={"content-type": "application/json"}))
    past = wrong_fields(http.post("/v1/jobs", json={"prompt": "x", "deadline_time": "2020-01-01T00:00:00Z"}))
    assert "deadline" in str(past)


def test_pictures(http, stages):
    data = picture(32, 128)
    for sent in ({"files": {"file": ("a", data)}}, {"content": data, "headers": {"content-type": "image/png"}}):
        answer = http.post("/v1/images", **sent)
        assert answer.status_code == 201
        assert (answer.json()["height"], answer.json()["width"]) == (128, 32)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for wanted in ({"image_id": answer.json()["image_id"]}, {"image": url}):
        job = end_of(http, create(http, **wanted)["id"])
        assert job["state"] == "completed" and (job["video"]["height"], job["video"]["width"]) == (64, 64)
        assert stages.vae.pictures[-1] == (128, 32, data)
    for content in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)):
        assert "file" in wrong_fields(http.post("/v1/images", content=content))
    assert "file" in wrong_fields(http.post("/v1/images", files={"other": ("a", data)}))
    assert wrong_fields(http.post("/v1/jobs", json={"prompt": "x", "image": url, "image_id": "y"}))


def test_models_and_queue(http):
    models = http.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == [MODEL]
    assert models["data"][0]["sizes"] == [{"height": 64, "width": 64}]
    queue = http.get("/v1/queue").json()
    assert queue["num_jobs"]["queued"] == 0 and queue["num_jobs"]["completed"] >= 1 and "wait_s" in queue


def test_a_batch_from_a_list(http):
    requests = [{"prompt": "one", "seed": 5}, {"prompt": "two", "num_inference_steps": 2}]
    answer = http.post("/v1/batches", json={"requests": requests, "samples_per_prompt": 2, "label": "batched"})
    assert answer.status_code == 201, answer.text
    batch = answer.json()
    assert len(batch["job_ids"]) == 4
    jobs = [end_of(http, job_id) for job_id in batch["job_ids"]]
    assert [job["parameters"]["prompt"] for job in jobs] == ["one", "one", "two", "two"]
    assert [job["parameters"]["seed"] for job in jobs] == [5, 6, 100, 101]
    listed = http.get("/v1/jobs", params={"batch_id": batch["batch_id"], "order": "asc"}).json()["jobs"]
    assert [job["id"] for job in listed] == batch["job_ids"]
    wrong = http.post("/v1/batches", json={"requests": [{"prompt": "x"}, {"prompt": "x", "height": 64}]})
    assert list(wrong_fields(wrong)) == ["requests[1].width"]
    assert wrong_fields(http.post("/v1/batches", json={}))
    assert "requests.0.seed" in wrong_fields(http.post("/v1/batches", json={"requests": [{"prompt": "x", "seed": -1}]}))


def test_a_batch_from_a_table_with_pictures(http, stages):
    table = 'text_prompt,image_path\n"a bell, far away",tall.png\na gong,\n'
    files = [("table", ("t.csv", table)), ("images", ("tall.png", picture(32, 128)))]
    form = {"num_inference_steps": "2", "seed": "40", "request_id": "table-1"}
    answer = http.post("/v1/batches", files=files, data=form)
    assert answer.status_code == 201, answer.text
    jobs = [end_of(http, job_id) for job_id in answer.json()["job_ids"]]
    assert [job["state"] for job in jobs] == ["completed", "completed"]
    assert jobs[0]["parameters"]["prompt"] == "a bell, far away" and jobs[0]["parameters"]["height"] == 128
    assert jobs[1]["parameters"]["image_id"] == "" and jobs[1]["parameters"]["num_inference_steps"] == 2
    assert http.post("/v1/batches", files=files, data=form).json() == answer.json(), "the same batch again"
    lacking = http.post("/v1/batches", files=[("table", ("t.csv", "text_prompt,image_path\nx,none.png\n"))])
    assert list(wrong_fields(lacking)) == ["table[0].image_id"]
    assert wrong_fields(http.post("/v1/batches", files=[("table", ("t.csv", "prompt\nx\n"))]))
    assert "seed" in wrong_fields(http.post("/v1/batches", files=files, data={"seed": "many"}))


def test_the_document_describes_every_route(http):
    document = http.get("/openapi.json").json()
    described = {
        (method, path) for path, methods in document["paths"].items() for method in methods if method != "parameters"
    }
    for wanted in (
        ("post", "/v1/jobs"),
        ("get", "/v1/jobs/{job_id}/events"),
        ("post", "/v1/batches"),
        ("post", "/v1/videos"),
        ("get", "/v1/videos/{video_id}/content"),
        ("post", "/api/generate"),
        ("post", "/v1/images"),
    ):
        assert wanted in described
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    names = {reference.partition('"')[0] for reference in references}
    assert names <= set(document["components"]["schemas"])


@pytest.mark.parametrize("path", ["/v1/jobs/nothing", "/v1/jobs/job_" + "0" * 26, "/v1/jobs/%00", "/v1/nowhere"])
def test_what_is_not_there(http, path):
    answer = http.get(path)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
