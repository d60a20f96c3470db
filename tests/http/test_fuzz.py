"""Input that nobody sends on purpose: whatever comes, no 5xx and no crash."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import httpx
import pytest
import schemathesis
import socketio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error

from tests.http.test_studio_api import OPTIONS, generation_job

_EXAMPLES = 6
"""Of each route; more find the same, only later."""
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
_SHORT = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def document(gateway) -> Any:
    """The gateway's OpenAPI document; streams are left out, since their answers last as long as the job."""
    loaded = schemathesis.openapi.from_url(f"{gateway.http_url}/openapi.json")
    return loaded.exclude(path_regex=r"/events$")


def test_every_route_of_the_document_survives_what_fits_it_and_what_does_not(document, gateway):
    tried = 0
    for result in document.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @_SHORT
            @given(case=operation.as_strategy(generation_mode=mode))
            def survives(case: Any) -> None:
                answer = case.call(timeout=60)
                case.validate_response(answer, checks=[not_a_server_error])
                assert answer.headers["x-request-id"]

            try:
                survives()
            except Unsatisfiable:
                assert mode is schemathesis.GenerationMode.NEGATIVE, "a route without anything to get wrong"
                continue
            tried += 1
    assert tried > 40 and httpx.get(f"{gateway.http_url}/healthz", timeout=60).status_code == 200
    errors = [entry for entry in gateway.service.log if entry["event"] == "unexpected error"]
    assert not errors, errors[-1]


def generate(http: httpx.Client, body: Any) -> int:
    """The status; numbers that JSON does not know are sent as Python writes them."""
    content = json.dumps(body).encode()
    return http.post("/api/generate", content=content, headers={"content-type": "application/json"}).status_code


@settings(_SHORT, max_examples=30)
@given(body=_JSON)
def test_any_json_to_the_studio(http, body):
    assert generate(http, body) in (400, 422)


@settings(_SHORT, max_examples=40)
@given(field=st.sampled_from(sorted(generation_job())), value=_JSON)
def test_a_studio_job_with_one_strange_field(http, field, value):
    assert generate(http, generation_job(**{field: value})) < 500


@settings(_SHORT, max_examples=40)
@given(field=st.sampled_from([*OPTIONS, "seed", "videoGuidance", "solver", "gpuAllocation"]), value=_JSON)
def test_a_studio_job_with_one_strange_option(http, field, value):
    assert generate(http, generation_job(options={**OPTIONS, field: value})) < 500


def test_any_message_to_any_socket_event(gateway):
    numbers = itertools.count()
    with socketio.SimpleClient() as client:
        client.connect(gateway.http_url, transports=["websocket"])

        @settings(_SHORT, max_examples=40)
        @given(event=st.sampled_from(["submit_job", "cancel_job", "message", "connect_error", "x"]), message=_JSON)
        def send(event: str, message: Any) -> None:
            client.emit(event, message)
            label = f"nobody {next(numbers)}"
            client.emit("cancel_job", {"id": label})
            while True:
                name, data = client.receive(timeout=60)
                if name == "error" and label in data["message"]:
                    return

        send()
    errors = [entry for entry in gateway.service.log if entry["event"] == "unexpected error"]
    assert not errors, errors[-1]


def test_frames_that_are_none(gateway, http):
    """Below Socket.IO's client: packets that no client makes."""
    random_bytes = random.Random(7)
    for number in range(40):
        shaken = http.get("/socket.io/", params={"EIO": "4", "transport": "polling"})
        sid = json.loads(shaken.text.removeprefix("0"))["sid"]
        packets = [
            b"40",
            b"42[",
            b'42["submit_job"',
            b'451-["submit_job",{"_placeholder":true,"num":0}]',
            b'42["submit_job",{"id":"a"},{"id":"b"}]',
            b"42[1,2]",
            b"49999",
            random_bytes.randbytes(30),
        ]
        address = {"EIO": "4", "transport": "polling", "sid": sid}
        for packet in packets[number % len(packets) :][:2]:
            answer = http.post("/socket.io/", params=address, content=packet)
            assert answer.status_code < 500, packet
    assert http.get("/healthz").status_code == 200
