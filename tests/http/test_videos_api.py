"""OpenAI's own client, as it is, against /v1/videos."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types import Video
from PIL import Image

from shared.errors import CheckpointError
from tests.grpc.gateway_client import GatewayUnderTest
from tests.grpc.scripted_stages import MODEL
from tests.http.clips import picture, tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def client(gateway: GatewayUnderTest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="any", base_url=f"{gateway.http_url}/v1", max_retries=0, timeout=60) as client:
        yield client


def made(client: openai.OpenAI, **fields: object) -> Video:
    video = client.videos.create_and_poll(prompt="a bell", poll_interval_ms=50, **fields)
    assert video.status == "completed", video
    return video


def test_create_and_poll(client, stages):
    video = client.videos.create(
        prompt="a bell",
        seconds="5",
        size="64x64",
        extra_body={"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "fog"},
    )
    assert video.object == "video" and video.status in ("queued", "in_progress") and video.prompt == "a bell"
    done = client.videos.poll(video.id, poll_interval_ms=50)
    assert done.status == "completed" and done.progress == 100 and done.error is None
    assert (done.model, done.seconds, done.size) == (MODEL, "5", "64x64")
    assert done.completed_at is not None and done.created_at <= done.completed_at
    request = stages.text_encoder.requests[-1]
    assert list(request.prompts)[:2] == ["a bell", "fog"]


def test_the_poll_header_is_a_number_of_milliseconds(client, by_hand):
    video = client.videos.create(prompt="slow")
    answer = client.videos.with_raw_response.retrieve(video.id)
    assert 100 <= int(answer.headers["openai-poll-after-ms"]) <= 10_000
    by_hand.fusion.next_call().finish()
    assert client.videos.poll(video.id).status == "completed"


def test_async_client(gateway):
    import asyncio

    async def run() -> Video:
        async with openai.AsyncOpenAI(api_key="any", base_url=f"{gateway.http_url}/v1", timeout=60) as client:
            return await client.videos.create_and_poll(prompt="a bell", poll_interval_ms=50)

    assert asyncio.run(run()).status == "completed"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_as_a_file_part(client, stages, kind):
    data = picture(128, 32, kind)
    video = made(client, input_reference=("any.bin", data))
    assert video.size == "128x32" and stages.vae.pictures[-1][2] == data


def test_a_picture_as_a_data_url_in_brackets_and_in_json(client, http, stages):
    url = "data:image/png;base64," + base64.b64encode(picture(32, 128)).decode()
    video = made(client, extra_body={"input_reference": {"image_url": url}})
    assert video.size == "32x128"
    answer = http.post("/v1/videos", json={"prompt": "x", "input_reference": {"image_url": url}, "seconds": 5})
    assert answer.status_code == 200 and answer.json()["size"] == "32x128"
    client.videos.poll(answer.json()["id"], poll_interval_ms=50)


def test_a_picture_by_its_upload_id(client, gateway):
    kept = gateway.upload(picture(64, 64))
    assert made(client, extra_body={"input_reference": {"file_id": kept.image_id}}).size == "64x64"


def test_list_pages_in_both_orders(client):
    ids = [client.videos.create(prompt=f"number {number}").id for number in range(5)]
    for order, expected in (("desc", ids[::-1]), ("asc", ids)):
        after = client.videos.create(prompt="border").id if order == "desc" else ids[0]
        listed = [video.id for video in client.videos.list(limit=2, order=order, after=after)]
        wanted = expected if order == "desc" else expected[1:]
        assert listed[: len(wanted)] == wanted
    page = client.videos.list(limit=1)
    assert page.has_more and page.data[0].id == page.last_id == page.first_id
    for video_id in ids:
        client.videos.poll(video_id, poll_interval_ms=50)


def test_a_failed_video_is_told_not_raised(client, by_hand):
    video = client.videos.create(prompt="broken")
    call = by_hand.fusion.next_call()
    call.fail(CheckpointError("/c/model.safetensors: truncated"))
    failed = client.videos.poll(video.id, poll_interval_ms=50)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "failed_precondition" and "truncated" in failed.error.message


def test_delete_removes_a_finished_and_stops_a_running_one(client, by_hand):
    running = client.videos.create(prompt="running")
    call = by_hand.fusion.next_call()
    deleted = client.videos.delete(running.id)
    assert deleted.deleted and deleted.id == running.id and deleted.object == "video.deleted"
    assert call.ended.wait(10), "its work was stopped"
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.retrieve(running.id)
    assert missing.value.code == "not_found" and missing.value.request_id


def test_content_variants(client, http):
    video = made(client)
    content = client.videos.download_content(video.id)
    assert content.content == tiny_clip() and content.response.headers["content-type"] == "video/mp4"
    assert content.response.headers["content-length"] == str(len(tiny_clip()))
    assert content.response.headers["accept-ranges"] == "bytes"
    assert f'filename="{video.id}.mp4"' in content.response.headers["content-disposition"]
    part = http.get(f"/v1/videos/{video.id}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == tiny_clip()[10:20]
    assert http.get(f"/v1/videos/{video.id}/content", headers={"Range": "bytes=99999999-"}).status_code == 416
    assert http.head(f"/v1/videos/{video.id}/content").headers["content-length"] == str(len(tiny_clip()))

    thumbnail = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").content))
    assert thumbnail.format == "WEBP" and thumbnail.size == (64, 64)
    assert abs(thumbnail.convert("L").getpixel((32, 32)) - 127) < 12, "the middle frame"
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").content))
    assert sheet.format == "JPEG" and sheet.size == (320, 320)
    levels = [sheet.convert("L").getpixel((column * 64 + 32, row * 64 + 32)) for row in range(5) for column in range(5)]
    assert levels == sorted(levels) and levels[0] < 12 and levels[-1] > 243
    again = client.videos.download_content(video.id, variant="spritesheet")
    assert again.response.headers["etag"], "kept beside the clip"


def test_content_before_the_end_is_not_found_with_a_code(client, by_hand):
    video = client.videos.create(prompt="slow")
    call = by_hand.fusion.next_call()
    for variant in ("video", "thumbnail"):
        with pytest.raises(openai.NotFoundError) as early:
            client.videos.download_content(video.id, variant=variant)
        assert early.value.code == "video_not_ready"
    call.finish()
    client.videos.poll(video.id, poll_interval_ms=50)


def test_remix_keeps_all_but_the_prompt(client, stages):
    source = made(client, extra_body={"seed": 77, "num_inference_steps": 2})
    remix = client.videos.remix(source.id, prompt="a gong")
    assert remix.remixed_from_video_id == source.id and remix.prompt == "a gong"
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    done = client.videos.poll(remix.id, poll_interval_ms=50)
    assert done.status == "completed" and done.remixed_from_video_id == source.id
    options = stages.fusion.next_call().request.options
    assert (options.seed, options.num_inference_steps) == (77, 2)


def referring(**reference: str) -> dict[str, object]:
    return {"extra_body": {"input_reference": reference}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "0 characters"),
        ({"model": "sora-2"}, "model", MODEL),
        ({"seconds": "12"}, "seconds", '"5"'),
        ({"seconds": "soon"}, "seconds", "whole number"),
        ({"size": "1920x1080"}, "size", "64x64"),
        ({"size": "large"}, "size", "WIDTHxHEIGHT"),
        ({"extra_body": {"seed": "-1"}}, "seed", "0 to 4294967295"),
        ({"extra_body": {"num_inference_steps": 2.5}}, "num_inference_steps", "whole number"),
        ({"extra_body": {"guidance_scale": "99"}}, "guidance_scale", "1 to 30"),
        ({"extra_body": {"solver": "magic"}}, "solver", "unipc"),
        ({"extra_body": {"vram_mode": "tiny"}}, "vram_mode", "ultra_low"),
        ({"extra_body": {"lora": {"id": "x"}}}, "lora", "no"),
        ({"extra_body": {"priority": 10}}, "priority", "0 to 9"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "unknown"),
        ({"input_reference": ("a.png", b"GIF89a")}, "input_reference", "PNG, JPEG and WebP"),
        (
            {"extra_body": {"input_reference": {"image_url": "https://example.com/a.png"}}},
            "input_reference[image_url]",
            "not fetched",
        ),
        (
            {"extra_body": {"input_reference": {"image_url": "data:image/png;base64,@@"}}},
            "input_reference[image_url]",
            "damaged",
        ),
        (referring(file_id="../../etc/passwd"), "input_reference", "UploadImage"),
    ],
)
def test_bad_input_is_refused_once_with_the_field(gateway, fields, param, said):
    with (
        openai.OpenAI(api_key="any", base_url=f"{gateway.http_url}/v1", max_retries=2, timeout=60) as client,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.videos.create(**({"prompt": "a bell"} | fields))
    error = refused.value
    assert error.param == param and said in error.message and error.type == "invalid_request_error" and error.code
    assert error.response.headers["x-should-retry"] == "false" and error.request_id


def test_error_classes(client):
    unknown = "job_" + "0" * 26
    for call in (
        lambda: client.videos.retrieve(unknown),
        lambda: client.videos.delete(unknown),
        lambda: client.videos.download_content(unknown),
        lambda: client.videos.remix(unknown, prompt="x"),
        lambda: client.videos.retrieve("../../etc/passwd"),
        lambda: client.videos.retrieve("\x00"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.list(limit=0)
    assert refused.value.param == "limit"
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.list(after=unknown)
    assert refused.value.param == "after"
    with pytest.raises(openai.BadRequestError):
        client.videos.download_content(unknown, variant="poster")


def test_an_idempotency_key_makes_one_video(client):
    for key in ("plain-key", "any: thing/at all"):
        headers = {"Idempotency-Key": key}
        first = client.videos.create(prompt="once", extra_headers=headers)
        assert client.videos.create(prompt="once", extra_headers=headers).id == first.id
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.create(prompt="twice", extra_headers=headers)
        assert refused.value.code == "already_exists"
        client.videos.poll(first.id, poll_interval_ms=50)


def test_every_answer_has_a_request_id(http):
    for path in ("/healthz", "/v1/videos", "/v1/videos/none", "/nowhere", "/api/jobs", "/metrics"):
        assert http.get(path).headers["x-request-id"]
    assert http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/healthz", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


def test_bodies_that_are_none(http: httpx.Client):
    for content, kind in (
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'"' * 100_000, "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b"no boundary", "multipart/form-data"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded"),
        (b"prompt[a]=a&prompt=b", "application/x-www-form-urlencoded"),
        (b"x" * 70_000, "text/plain"),
    ):
        answer = http.post("/v1/videos", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, (content[:20], answer.text)
        assert answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused(http: httpx.Client):
    answer = http.post("/v1/videos", content=bytes(49 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    chunked = http.post("/v1/images", content=(bytes(1 << 20) for _ in range(49)))
    assert chunked.status_code == 413 and chunked.json()["error"]["message"]
