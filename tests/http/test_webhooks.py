"""Webhooks: signed, tried again, told after a restart, and only to whom they may go."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from services.gateway.http.webhooks.signing import read_secret
from services.gateway.http.webhooks.targets import Refused, TargetRules, is_public
from shared.errors import InvalidRequest
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.http.clips import tiny_clip

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
WAIT_S = 60.0


class Receiver:
    """An HTTP server that notes every call and answers as it is told; 200 when nothing is left to say."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, dict[str, str], bytes]] = queue.Queue()
        self.answers: queue.Queue[int] = queue.Queue()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.calls.put((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status = 200
                with contextlib.suppress(queue.Empty):
                    status = receiver.answers.get_nowait()
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/hook?x=1"

    def next_call(self) -> tuple[str, dict[str, str], bytes]:
        return self.calls.get(timeout=WAIT_S)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    secret = tmp_path_factory.mktemp("secret") / "webhooks"
    secret.write_text(SECRET + "\n")
    return ["--webhook-secret-file", str(secret), "--webhook-hosts", "localhost,*.example.com"]


@pytest.fixture(scope="module")
def gateway(stages, flags, tmp_path_factory) -> Iterator[GatewayUnderTest]:
    data_dir = tmp_path_factory.mktemp("gateway") / "data"
    with running_gateway(data_dir, *stages.flags, *flags, "--webhook-private") as gateway:
        yield gateway


def create(http: httpx.Client, url: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/jobs", json={"prompt": "a bell", "num_inference_steps": 2, "webhook_url": url} | fields)


def test_the_end_of_a_job_is_told_and_signed(http, receiver):
    job = create(http, receiver.url).json()
    path, headers, body = receiver.next_call()
    assert path == "/hook?x=1" and headers["host"] == f"localhost:{receiver.port}"
    told = json.loads(body)
    assert told["type"] == "job.completed" and told["data"]["id"] == job["id"]
    assert told["data"] == http.get(f"/v1/jobs/{job['id']}").json()
    with openai.OpenAI(api_key="any") as client:
        client.webhooks.verify_signature(body, headers, secret=SECRET)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body + b" ", headers, secret=SECRET)
    assert len(tiny_clip()) == told["data"]["video"]["num_bytes"]


def test_a_call_that_fails_is_made_again_with_the_same_id(http, receiver):
    for status in (500, 302):
        receiver.answers.put(status)
    job = create(http, receiver.url).json()
    calls = [receiver.next_call() for _ in range(3)]
    assert {headers["webhook-id"] for _, headers, _ in calls} == {job["id"]}
    assert [path for path, _, _ in calls] == ["/hook?x=1"] * 3, "a redirect is a failure, and is not followed"
    times = [int(headers["webhook-timestamp"]) for _, headers, _ in calls]
    assert times[2] - times[0] >= 2, "pauses grow"


def test_a_webhook_survives_the_gateway(stages, flags, receiver, tmp_path):
    data_dir = tmp_path / "data"
    stages.fusion.automatic = False
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    try:
        arguments = [*stages.flags, *flags, "--webhook-private"]
        with running_gateway(data_dir, *arguments) as first, httpx.Client(base_url=first.http_url, timeout=60) as http:
            job = create(http, receiver.url).json()
            stages.fusion.next_call()
            first.service.process.kill()
        with running_gateway(data_dir, *arguments):
            stages.fusion.next_call().finish()
            _, _, body = receiver.next_call()
    finally:
        stages.fusion.automatic = True
    assert json.loads(body)["data"]["id"] == job["id"] and json.loads(body)["type"] == "job.completed"


def test_a_receiver_that_is_gone_is_not_asked_again(http, receiver, gateway):
    receiver.answers.put(410)
    job = create(http, receiver.url).json()
    receiver.next_call()
    create(http, receiver.url)
    receiver.next_call()
    notes = [entry for entry in gateway.service.log if entry["event"] == "webhook not delivered"]
    assert [note["final"] for note in notes if note["job_id"] == job["id"]] == [True]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "URL"),
        ("ftp://localhost/x", "https"),
        ("http://user:password@localhost/", "password"),
        ("http://127.0.0.1/", "localhost, *.example.com"),
        ("http://example.com/", "localhost, *.example.com"),
        ("http://localhost.evil.com/", "localhost, *.example.com"),
        ("http://evilexample.com/", "localhost, *.example.com"),
        ("http://[::1]/", "localhost, *.example.com"),
        ("http://localhost:99999/", "URL"),
    ],
)
def test_only_hosts_of_the_list(http, url, said):
    refused = create(http, url)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "webhook_url"
    assert said in refused.json()["error"]["message"]


def test_without_a_secret_nobody_is_called(stages, tmp_path):
    with (
        running_gateway(tmp_path / "data", *stages.flags) as gateway,
        httpx.Client(base_url=gateway.http_url, timeout=60) as http,
    ):
        refused = create(http, "https://localhost/")
        assert refused.status_code == 400 and "--webhook-secret-file" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1"),
        *("ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are_public():
    for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"):
        assert is_public(address)


async def _resolved(rules: TargetRules, url: str) -> Any:
    return await rules.resolve(rules.check(url, field="webhook_url"))


def test_private_addresses_are_refused_when_they_are_looked_up():
    import asyncio

    strict = TargetRules(["localhost"], allow_private=False)
    with pytest.raises(Refused, match="not a public one"):
        asyncio.run(_resolved(strict, "https://localhost/"))
    with pytest.raises(InvalidRequest, match="https"):
        strict.check("http://localhost/", field="webhook_url")
    target = asyncio.run(_resolved(TargetRules(["localhost"], allow_private=True), "https://localhost:8443/x?y=1"))
    assert target.host_header == "localhost:8443" and target.address in ("127.0.0.1", "::1")
    assert target.pinned_url.host == target.address and target.pinned_url.port == 8443
    assert str(target.pinned_url).endswith("/x?y=1")


def test_secrets_that_are_none(tmp_path: Path):
    file = tmp_path / "secret"
    for content in ("", "whsec_", "whsec_c2hvcnQ=", "not base 64 at all, but long enough to be one"):
        file.write_text(content)
        with pytest.raises(ValueError, match="webhook-secret-file"):
            read_secret(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_secret(tmp_path / "none")
    file.write_text(SECRET)
    assert read_secret(file) == bytes(range(32))
