"""OpenAI's client against keys, limits and retention: its error classes, and its own retries."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
import structlog
from fastapi import FastAPI
from starlette.requests import Request

from services.gateway.http.backend import GatewayPhase
from services.gateway.http.errors import add_error_handlers
from shared.errors import CorruptTensor, DiskFull, QuotaExceeded, Unavailable
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages
from tests.http.node import studio_client
from tests.http.test_studio_api import generation_job

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

KEY = "an-administrators-key-from-a-file-0123456789"
PER_MINUTE = 40
DAY_S = 86_400


@pytest.fixture(scope="module")
def gateway(stages: ScriptedStages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "key").write_text(KEY)
    keys = ["--auth", "required", "--admin-key-file", str(folder / "key"), "--requests-per-minute", str(PER_MINUTE)]
    with running_gateway(folder / "data", *stages.flags, *keys, "--retention-days", "1") as gateway:
        yield gateway


def client_of(gateway: GatewayUnderTest, key: str = KEY, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{gateway.http_url}/v1", max_retries=retries, timeout=60)


def test_a_wrong_key_is_an_authentication_error(gateway):
    with client_of(gateway, "sk-wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.videos.list()
    assert refused.value.request_id and refused.value.type == "authentication_error"


def test_videos_say_when_they_go(gateway):
    with client_of(gateway) as client:
        video = client.videos.create_and_poll(prompt="a bell", poll_interval_ms=500)
        assert video.status == "completed" and video.expires_at == pytest.approx(video.completed_at + DAY_S, abs=1)


def test_the_studio_is_given_links_that_a_player_can_open(gateway):
    with studio_client(gateway.http_url, key=KEY) as client, httpx.Client(base_url=gateway.http_url) as http:
        job = generation_job()
        client.emit("submit_job", job)
        told = client.wait("job_update", id=job["id"], status="completed")
        shown = http.get(f"/api/jobs/{job['id']}", headers={"authorization": f"Bearer {KEY}"}).json()
        for url in (told["videoUrl"], shown["videoUrl"]):
            assert "signature=" in url and http.get(url).status_code == 200
        assert http.get(told["videoUrl"].partition("?")[0]).status_code == 401


def test_too_many_calls_are_told_and_the_client_comes_again(gateway):
    with client_of(gateway) as client, pytest.raises(openai.RateLimitError) as refused:
        for _ in range(2 * PER_MINUTE):
            client.videos.list(limit=1)
    answer = refused.value.response
    assert int(answer.headers["retry-after"]) >= 1 and answer.headers["x-should-retry"] == "true"
    assert refused.value.type == "rate_limit_error" and refused.value.code
    with client_of(gateway, retries=2) as client:
        answers = (client.videos.with_raw_response.list(limit=1) for _ in range(2 * PER_MINUTE))
        again = next(answer for answer in answers if answer.retries_taken)
    assert again.parse().data, "refused first, then answered"


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "should_retry"),
    [
        (Unavailable("draining"), 503, "2", "true"),
        (QuotaExceeded("no more today", "key:a", 7.2), 429, "8", "true"),
        (DiskFull("the disk is full"), 507, None, "false"),
        (CorruptTensor("damaged"), 500, None, "false"),
        (ZeroDivisionError("never mind"), 500, None, "false"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/jobs", "/api/jobs"])
def test_what_can_pass_is_told_apart_from_what_cannot(path, error, status, retry_after, should_retry):
    app = FastAPI()
    add_error_handlers(app)

    @app.get(path)
    async def route(request: Request) -> None:
        raise error

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    with structlog.testing.capture_logs() as logs:
        answer = asyncio.run(call())
    assert answer.status_code == status and answer.headers["x-should-retry"] == should_retry
    assert answer.headers.get("retry-after") == retry_after
    body = answer.json()
    message = body["detail"] if path.startswith("/api") else body["error"]["message"]
    if isinstance(error, ZeroDivisionError):
        (unexpected,) = [entry for entry in logs if entry["event"] == "unexpected error"]
        assert "never mind" not in message and unexpected["error_id"] in message
    else:
        assert message == str(error)


def test_a_gateway_that_drains_takes_no_work():
    phase = GatewayPhase()
    with pytest.raises(Unavailable, match="draining"):
        phase.require_serving()
    phase.serving = True
    phase.require_serving()
