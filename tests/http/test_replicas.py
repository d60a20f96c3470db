"""Two gateways on one PostgreSQL: HTTP clients of either one are told of every job."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages
from tests.http.clips import tiny_clip
from tests.http.node import studio_client
from tests.http.test_jobs_api import events_of
from tests.http.test_studio_api import OPTIONS, generation_job
from tests.http.test_webhooks import SECRET, Receiver
from tests.postgres import running_postgres


@pytest.fixture
def gateways(stages: ScriptedStages, tmp_path: Path) -> Iterator[list[GatewayUnderTest]]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    webhooks = ["--webhook-secret-file", str(secret), "--webhook-hosts", "localhost", "--webhook-private"]
    with running_postgres() as postgres, contextlib.ExitStack() as stack:
        flags = ["--database-url", postgres.new_database(), "--max-concurrent-jobs", "1", *stages.flags, *webhooks]
        yield [stack.enter_context(running_gateway(tmp_path / "data", *flags)) for _ in range(2)]


def test_clients_of_both_are_told_of_every_job_and_receivers_once(gateways, by_hand):
    receiver = Receiver()
    with contextlib.ExitStack() as stack:
        stack.callback(receiver.close)
        clients = [stack.enter_context(studio_client(gateway.http_url)) for gateway in gateways]
        https = [stack.enter_context(httpx.Client(base_url=gateway.http_url, timeout=60)) for gateway in gateways]
        jobs = [generation_job(options={**OPTIONS, "steps": 3}) for _ in gateways]
        for client, job in zip(clients, jobs, strict=True):
            client.emit("submit_job", job)
            client.wait("job_submitted", id=job["id"])
        calls = [by_hand.fusion.next_call() for _ in gateways]
        for call in calls:
            call.finish()
        # Each gateway takes one of the two jobs, so every client hears of one that is worked on elsewhere.
        for client, http in zip(clients, https, strict=True):
            ended = {}
            while len(ended) < len(jobs):
                update = client.wait("job_update", status="completed")
                ended[update["id"]] = update
            assert set(ended) == {job["id"] for job in jobs}
            for update in ended.values():
                assert http.get(update["videoUrl"]).content == tiny_clip()
        made = [
            http.post("/v1/jobs", json={"prompt": "told", "webhook_url": receiver.url}).json()["id"] for http in https
        ]
        readers = [events_of(http, job_id) for http, job_id in zip(https[::-1], made, strict=True)]
        for reader in readers:
            next(reader)
        for _ in gateways:
            by_hand.fusion.next_call().finish()
        assert [list(reader)[-1][1]["state"] for reader in readers] == ["completed", "completed"]
        told = [json.loads(receiver.next_call()[2])["data"]["id"] for _ in made]
        assert sorted(told) == sorted(made)
    assert receiver.calls.empty(), "nobody was told twice"
