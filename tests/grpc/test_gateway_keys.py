"""Who may do what: API keys, roles, limits, links and the audit, over gRPC and HTTP."""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from typer.testing import CliRunner

from cli.main import app
from ovi.common.v1 import system_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages, clip_of, scripted_stages

CALL_S = 30.0
ADMIN_KEY = "an-administrators-key-from-a-file-0123456789"
MAX_WATCHES = 2
NOT_FOUND, DENIED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED


def ovi(*arguments: str | Path) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def new_key(data_dir: Path, name: str, *flags: str) -> str:
    return ovi("keys", "create", name, "--data-dir", data_dir, *flags).strip()


@pytest.fixture(scope="module")
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gateway") / "data"


@pytest.fixture(scope="module")
def keys(data_dir) -> dict[str, str]:
    """Made before the gateway has ever run."""
    return {
        "ann": new_key(data_dir, "Ann"),
        "ben": new_key(data_dir, "Ben", "--role", "user"),
        "eye": new_key(data_dir, "Eye", "--role", "viewer"),
        "few": new_key(data_dir, "Few", "--requests-per-minute", "3"),
    }


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def gateway(stages, data_dir, keys, audit_log, tmp_path_factory) -> Iterator[GatewayUnderTest]:
    admin = tmp_path_factory.mktemp("admin") / "key"
    admin.write_text(ADMIN_KEY + "\n")
    flags = ["--auth", "required", "--admin-key-file", str(admin), "--audit-log", str(audit_log)]
    with running_gateway(data_dir, *stages.flags, *flags, "--max-watches", str(MAX_WATCHES)) as gateway:
        yield gateway


_CallDetails = collections.namedtuple(
    "_CallDetails", ("method", "timeout", "metadata", "credentials", "wait_for_ready")
)


class _CallDetailsWith(_CallDetails, grpc.ClientCallDetails):
    """What gRPC asks for."""


@dataclass
class _Shows(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Adds metadata to every call."""

    metadata: tuple[tuple[str, str], ...]

    def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        given = (details.method, details.timeout, self.metadata, details.credentials, None)
        return go_on(_CallDetailsWith(*given), request)

    intercept_unary_stream = intercept_stream_unary = intercept_unary_unary


def showing(gateway: GatewayUnderTest, *metadata: tuple[str, str]) -> GatewayUnderTest:
    """The same gateway for a client with this metadata."""
    client = copy.copy(gateway)
    client.__init__(gateway.service, gateway.data_dir)
    client.channel = grpc.intercept_channel(gateway.channel, _Shows(metadata))
    for name in ("jobs", "models", "system"):
        setattr(client, name, type(getattr(gateway, name))(client.channel))
    return client


@pytest.fixture(scope="module")
def people(gateway, keys) -> dict[str, GatewayUnderTest]:
    everybody = {**keys, "admin": ADMIN_KEY}
    return {name: showing(gateway, ("authorization", f"Bearer {key}")) for name, key in everybody.items()}


@contextlib.contextmanager
def refused(code: grpc.StatusCode, words: str = "") -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is code and words in caught.value.details(), caught.value


def http(gateway: GatewayUnderTest, key: str = "") -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=gateway.http_url, headers=headers, timeout=CALL_S)


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", "Bearer"),),
        (("authorization", "Basic YTpi"),),
        (("authorization", "Bearer ovi_aaaaaaaa_" + "A" * 43),),
        (("authorization", "Bearer " + "x" * 4000),),
        (("x-api-key", ADMIN_KEY[:-1]),),
        (("x-api-key", "ovi_';drop_" + "A" * 43),),
    ],
)
def test_wrong_keys_are_told_what_to_do(gateway, metadata):
    with refused(grpc.StatusCode.UNAUTHENTICATED, "ovi keys create NAME"):
        showing(gateway, *metadata).jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
    with httpx.Client(base_url=gateway.http_url, headers=dict(metadata)) as client:
        assert client.get("/v1/videos").status_code == 401


def test_without_a_key_everything_is_closed(gateway):
    client = gateway
    with refused(grpc.StatusCode.UNAUTHENTICATED, "ovi keys create NAME"):
        client.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        list(client.jobs.WatchJob(pb.WatchJobRequest(id="job_" + "0" * 26), timeout=CALL_S))
    with refused(grpc.StatusCode.UNAUTHENTICATED):
        client.upload(b"no picture")
    with http(gateway) as client:
        for path in ("/v1/videos", "/v1/jobs", "/api/jobs", "/metrics", "/nowhere"):
            answer = client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        assert client.post("/v1/videos", json={"prompt": "a bell"}).status_code == 401
        error = client.get("/v1/videos").json()["error"]
        assert error["type"] == "authentication_error" and error["code"] == "unauthenticated"
        assert "ovi keys create" in error["message"]


def test_probes_and_reflection_ask_nobody(gateway):
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S).status == health_pb2.HealthCheckResponse.SERVING
    with http(gateway) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").json()["status"] == "ready"


def test_users_see_their_own_jobs_alone(gateway, people, keys):
    ann, ben, eye, admin = (people[name] for name in ("ann", "ben", "eye", "admin"))
    job = ann.create(seed=21, request_id="mine")
    assert ann.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    theirs = ben.create(seed=22, request_id="mine")
    assert theirs.id != job.id, "request ids of two keys do not meet"
    ben.end_of(theirs.id)

    for call in (
        lambda: ben.get(job.id),
        lambda: list(ben.watch(job.id)),
        lambda: ben.download(job.id),
        lambda: ben.cancel(job.id),
        lambda: ben.delete(job.id),
        lambda: ben.jobs.PauseJob(pb.PauseJobRequest(id=job.id), timeout=CALL_S),
        lambda: ben.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=CALL_S),
    ):
        with refused(NOT_FOUND, "there is no job"):
            call()
    listed = ben.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S).jobs
    assert {shown.id for shown in listed} == {theirs.id}
    with http(gateway, keys["ben"]) as client:
        for path in (f"/v1/jobs/{job.id}", f"/v1/videos/{job.id}", f"/v1/videos/{job.id}/content"):
            assert client.get(path).status_code == 404, path
        assert client.get(f"/v1/jobs/{job.id}/events").status_code == 404
        assert client.get(f"/api/videos/{job.id}.mp4").status_code == 404
        assert client.get(f"/api/jobs/{job.id}").status_code == 404
        assert client.delete(f"/v1/videos/{job.id}").status_code == 404
        assert {entry["id"] for entry in client.get("/v1/videos").json()["data"]} == {theirs.id}
        assert job.id not in client.get("/api/jobs").text
    for reader in (ann, eye, admin):
        assert reader.get(job.id).id == job.id
        assert reader.download(job.id) == clip_of(21)
    shown = {entry.id for entry in eye.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S).jobs}
    assert {job.id, theirs.id} <= shown
    with refused(NOT_FOUND):
        ann.get("job_" + "0" * 26)


def test_viewers_change_nothing(gateway, people, keys):
    eye, job = people["eye"], people["ann"].create(seed=23)
    for call in (
        lambda: eye.create(),
        lambda: eye.cancel(job.id),
        lambda: eye.delete(job.id),
        lambda: eye.upload(b"x"),
    ):
        with refused(DENIED, "role viewer; this call needs user or higher"):
            call()
    with http(gateway, keys["eye"]) as client:
        answer = client.post("/v1/videos", json={"prompt": "a bell"})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
        assert client.post("/api/generate", json={}).status_code == 403
        assert client.delete(f"/v1/videos/{job.id}").status_code == 403
        assert client.get("/metrics").status_code == 200
    people["ann"].end_of(job.id)


def test_only_administrators_switch_the_stack_and_it_is_noted(people, keys, audit_log):
    request = system_pb2.SetModeRequest()
    for name in ("ann", "eye"):
        with refused(DENIED, "needs admin"):
            people[name].system.SetMode(request, timeout=CALL_S)
    people["admin"].system.SetMode(request, timeout=CALL_S)
    job = people["ann"].create(seed=24, prompt="a very private prompt")
    people["admin"].cancel(job.id)
    lines = [json.loads(line) for line in audit_log.read_text().splitlines()]
    switches = [line for line in lines if line["call"].endswith("/SetMode")]
    assert [(line["key_name"], line["outcome"]) for line in switches] == [
        ("Ann", "refused: role user"),
        ("Eye", "refused: role viewer"),
        ("--admin-key-file", "allowed"),
    ]
    cancels = [line for line in lines if line["call"].endswith("/CancelJob") and line["outcome"] == "allowed"]
    assert [line["role"] for line in cancels] == ["admin"] and cancels[0]["address"] == "127.0.0.1"
    text = audit_log.read_text()
    assert "private" not in text and ADMIN_KEY not in text and not any(key in text for key in keys.values())
    assert audit_log.stat().st_mode & 0o077 == 0


def test_a_revoked_key_ends_within_seconds(gateway, data_dir):
    key = new_key(data_dir, "Gone")
    client = showing(gateway, ("x-api-key", key))
    client.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
    key_id = next(entry["id"] for entry in listed_keys(data_dir) if entry["name"] == "Gone")
    ovi("keys", "revoke", key_id, "--data-dir", data_dir)
    deadline_s = time.monotonic() + 10
    with refused(grpc.StatusCode.UNAUTHENTICATED, "revoked"):
        while time.monotonic() < deadline_s:
            try:
                client.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # asked more often than a key may
                    raise


def listed_keys(data_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ovi("keys", "list", "--data-dir", data_dir, "--json").splitlines()]


def test_keys_are_kept_as_hashes(data_dir, keys):
    content = b"".join(file.read_bytes() for file in data_dir.glob("ovi.sqlite3*"))
    assert b"Ann" in content
    for key in keys.values():
        assert key.encode() not in content and key[13:].encode() not in content
    shown = ovi("keys", "list", "--data-dir", data_dir)
    assert keys["ann"][:12] in shown and not any(key in shown for key in keys.values())


def test_calls_of_a_key_are_limited(gateway, people, keys):
    few = people["few"]
    for _ in range(3):
        few.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
    with pytest.raises(grpc.RpcError) as caught:
        few.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
    assert 0 < retry.retry_delay.ToMilliseconds() <= 20_000
    with http(gateway, keys["few"]) as client:
        answer = client.get("/v1/videos")
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 20
        assert answer.json()["error"]["type"] == "rate_limit_error"
    people["ann"].jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)


def test_jobs_a_day_are_limited_from_the_first_call(gateway, data_dir):
    daily = showing(gateway, ("x-api-key", new_key(data_dir, "Daily", "--max-daily", "1")))
    first = daily.create(seed=31)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        daily.create(seed=32)
    daily.end_of(first.id)


def test_open_watches_of_a_key_are_limited(people, stages):
    ann = people["ann"]
    stages.fusion.automatic = False
    try:
        job = ann.create(seed=41)
        watches = [ann.jobs.WatchJob(pb.WatchJobRequest(id=job.id), timeout=CALL_S) for _ in range(MAX_WATCHES)]
        for watch in watches:
            next(watch)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "close one"):
            next(ann.jobs.WatchJob(pb.WatchJobRequest(id=job.id), timeout=CALL_S))
        # Another key has its own.
        next(people["admin"].jobs.WatchJob(pb.WatchJobRequest(id=job.id), timeout=CALL_S))
        for watch in watches:
            watch.cancel()
        deadline_s = time.monotonic() + 10
        while True:
            try:
                next(ann.jobs.WatchJob(pb.WatchJobRequest(id=job.id), timeout=CALL_S))
                break
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and time.monotonic() < deadline_s
        ann.cancel(job.id)
    finally:
        stages.fusion.automatic = True


def test_a_signed_link_opens_one_clip_without_a_key(gateway, people, keys):
    ann = people["ann"]
    job = ann.end_of(ann.create(seed=51).id)
    other = ann.end_of(ann.create(seed=52).id)
    link = ann.get(job.id).video.url_path
    path, _, query = link.partition("?")
    with http(gateway) as client:
        assert client.get(link).content == clip_of(51)
        assert client.head(link).status_code == 200
        parameters = dict(part.split("=") for part in query.split("&"))
        later = {**parameters, "expires": str(int(parameters["expires"]) + 1)}
        past = {**parameters, "expires": "1000000000"}
        for url, wrong in (
            (path, {}),
            (path, later),
            (path, past),
            (path, {**parameters, "signature": "0" * 64}),
            (path, {**parameters, "signature": "ü"}),
            (path, {**parameters, "expires": "²"}),
            (f"/api/videos/{other.id}.mp4", parameters),
            (f"/v1/jobs/{job.id}", parameters),
        ):
            assert client.get(url, params=wrong).status_code == 401, (url, wrong)
        assert client.delete(link).status_code in (401, 405)


class Socket:
    """A Socket.IO connection by long polling, as bare as it gets."""

    def __init__(self, gateway: GatewayUnderTest, auth: str, headers: dict[str, str] | None = None) -> None:
        self._client = httpx.Client(base_url=gateway.http_url, headers=headers, timeout=CALL_S)
        self._query = {"EIO": "4", "transport": "polling"}
        self._query["sid"] = json.loads(self._poll()[0][1:])["sid"]
        self._unread: list[str] = []
        self._post(f"40{auth}")
        self.answer = self._next("4")

    def emit(self, event: str, content: Any) -> str:
        """What is said to this client of an event: its name and content as JSON."""
        self._post("42" + json.dumps([event, content]))
        return self._next("42")

    def _post(self, packet: str) -> None:
        assert self._client.post("/socket.io/", params=self._query, content=packet).status_code == 200

    def _next(self, kind: str) -> str:
        while True:
            self._unread += [] if self._unread else self._poll()
            packet = self._unread.pop(0)
            if packet == "2":
                self._post("3")
            elif packet.startswith(kind) and "job_update" not in packet:
                return packet

    def _poll(self) -> list[str]:
        return self._client.get("/socket.io/", params=self._query).text.split("\x1e")


@pytest.mark.parametrize("auth", ["", "{}", '{"token": ""}', '{"token": 5}', '{"token": "ovi_x"}', '["a"]', '"text"'])
def test_sockets_without_a_good_key_are_not_connected(gateway, auth):
    answer = Socket(gateway, auth).answer
    assert answer.startswith("44") and "API key" in answer


def test_sockets_act_for_their_keys(gateway, people, keys, data_dir):
    job = people["ann"].end_of(people["ann"].create(seed=61).id)
    by_token = Socket(gateway, json.dumps({"token": keys["ben"]}))
    assert by_token.answer.startswith("40")
    assert "there is no job" in by_token.emit("cancel_job", {"id": job.id})
    viewing = Socket(gateway, "", {"authorization": f"Bearer {keys['eye']}"})
    assert "needs user or higher" in viewing.emit("cancel_job", {"id": job.id})
    key = new_key(data_dir, "Short")
    ending = Socket(gateway, json.dumps({"token": key}))
    assert "there is no job" in ending.emit("cancel_job", {"id": "x"})
    key_id = next(entry["id"] for entry in listed_keys(data_dir) if entry["name"] == "Short")
    ovi("keys", "revoke", key_id, "--data-dir", data_dir)
    deadline_s = time.monotonic() + 10
    while "revoked" not in ending.emit("cancel_job", {"id": "x"}):
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "..%2f..%2fetc", "job_/../x", "a\x00b", "~", "job_" + "é" * 26])
def test_ids_never_become_paths(gateway, people, keys, job_id):
    ann = people["ann"]
    for call in (
        lambda: ann.get(job_id),
        lambda: ann.download(job_id),
        lambda: ann.delete(job_id),
        lambda: list(ann.watch(job_id)),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            call()
    with http(gateway, keys["ann"]) as client:
        quoted = job_id.replace("\x00", "%00")
        for path in (f"/v1/jobs/{quoted}", f"/v1/videos/{quoted}/content", f"/api/videos/{quoted}.mp4"):
            assert client.get(path).status_code in (400, 404, 422), path


def test_wrong_keys_are_limited_and_good_ones_from_there_stay_good(gateway, people):
    """The last test: afterwards this address has no tries left."""
    wrong = showing(gateway, ("x-api-key", "ovi_zzzzzzzz_" + "A" * 43))
    codes = []
    for _ in range(100):
        with pytest.raises(grpc.RpcError) as caught:
            wrong.jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
        codes.append(caught.value.code())
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    people["ann"].jobs.ListJobs(pb.ListJobsRequest(), timeout=CALL_S)
