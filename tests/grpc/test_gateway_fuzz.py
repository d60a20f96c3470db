"""Bytes that are no messages, messages that make no sense, headers that nobody sends: refused, and served on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor as descriptors
from google.protobuf import message_factory
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovi.common.v1 import system_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.auth.policy import listed_rpcs
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import scripted_stages
from tests.postgres import running_postgres

CALL_S = 20.0
KEY = "an-administrators-key-from-a-file-0123456789"
SHOWN = (("authorization", f"Bearer {KEY}"),)
SERVICES = (
    pb.DESCRIPTOR.services_by_name["JobService"],
    pb.DESCRIPTOR.services_by_name["ModelService"],
    pb.DESCRIPTOR.services_by_name["WorkerService"],
    system_pb2.DESCRIPTOR.services_by_name["SystemService"],
)
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
OUR_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
NASTY = (
    "",
    "../../../etc/passwd",
    "/etc/passwd",
    "job_" + "0" * 26,
    "job_" + "Z" * 26,
    "job_../../../../../x",
    "..\\..\\x",
    "a\x00b",
    "%2e%2e%2f",
    "'; DROP TABLE jobs; --",
    "\u202e\U0001f3b7",
    "x" * 5001,
    "{}",
)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    """On both databases: what one takes, the other may choke on."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "key").write_text(KEY)
    flags = ["--auth", "required", "--admin-key-file", str(folder / "key")]
    flags += ["--requests-per-minute", "0", "--address-requests-per-minute", "0"]
    with contextlib.ExitStack() as running:
        if request.param == "postgresql":
            flags += ["--database-url", running.enter_context(running_postgres()).new_database()]
        stages = running.enter_context(scripted_stages())
        yield running.enter_context(running_gateway(folder / "data", *stages.flags, *flags))


def status_of_call(gateway: GatewayUnderTest, path: str, bodies: list[bytes], metadata: Any = SHOWN) -> grpc.StatusCode:
    """The status of a call with these bytes; of a stream that goes on, after its first answer."""
    method = METHODS[path]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    make = getattr(gateway.channel, kind)(path)
    try:
        call = make(iter(bodies) if method.client_streaming else bodies[0], timeout=CALL_S, metadata=metadata)
        if method.server_streaming:
            next(call, None)
            call.cancel()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def sensible(code: grpc.StatusCode) -> bool:
    return code not in OUR_FAULT and code is not grpc.StatusCode.DEADLINE_EXCEEDED


def values_of(field: descriptors.FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth + 1)
    by_type = {
        field.CPPTYPE_STRING: st.sampled_from(NASTY) | st.text(max_size=40),
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_DOUBLE: st.floats(),
        field.CPPTYPE_FLOAT: st.floats(width=32),
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
        field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        field.CPPTYPE_ENUM: st.integers(-3, 40),
    }
    return st.binary(max_size=200) if field.type == field.TYPE_BYTES else by_type[field.cpp_type]


@st.composite
def messages(draw: Any, kind: descriptors.Descriptor, depth: int = 0) -> Message:
    """Any message of a type: well-formed, with values that nobody means."""
    message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if depth > 4 or not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        repeated = field.is_repeated
        chosen = draw(st.lists(values_of(field, depth), max_size=3)) if repeated else [draw(values_of(field, depth))]
        for value in chosen:
            if field.message_type is not None:
                (getattr(message, field.name).add() if repeated else getattr(message, field.name)).CopyFrom(value)
            elif repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


@st.composite
def damaged(draw: Any, kind: descriptors.Descriptor) -> bytes:
    """The bytes of a message with a piece cut out and other bytes in its place."""
    content = draw(messages(kind)).SerializeToString()
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)))
    return content[:start] + draw(st.binary(max_size=20)) + content[end:]


def test_every_call_was_decided_about():
    assert set(METHODS) == listed_rpcs(), "services/gateway/auth/policy.py says for whom each call is"


@pytest.mark.parametrize("path", METHODS)
def test_nothing_that_is_sent_breaks_a_call(gateway, path):
    kind = METHODS[path].input_type
    bodies = messages(kind).map(lambda message: message.SerializeToString()) | damaged(kind) | st.binary(max_size=300)

    @FEW
    @given(st.lists(bodies, min_size=1, max_size=3))
    def send(sent: list[bytes]) -> None:
        code = status_of_call(gateway, path, sent)
        assert sensible(code), (code, sent)

    send()


@pytest.mark.parametrize("path", METHODS)
def test_messages_beyond_the_limit_are_refused(gateway, path):
    # A field that no message has, so that only its size is wrong.
    body = b"\xfa\x3f" + b"\x80\x80\xc0\x02" + b"x" * (5 << 20)
    assert status_of_call(gateway, path, [body]) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_odd_headers_do_no_harm(gateway):
    path = "/ovi.gateway.v1.JobService/ListJobs"
    for odd in (
        ("x-request-id", "x" * 4000),
        ("x-request-id", "a\\nb {} %s"),
        ("x-request-id-bin", b"\x00\xff" * 100),
        ("authorization-bin", b"\xff\xfe"),
        ("grpc-timeout", "99999999H"),
        ("x-api-key", ""),
        ("user-agent", "../../x"),
    ):
        assert status_of_call(gateway, path, [b""], (*SHOWN, odd)) is grpc.StatusCode.OK, odd
    much = tuple((f"x-{number}", "y" * 1000) for number in range(40))
    assert status_of_call(gateway, path, [b""], (*SHOWN, *much)) is not grpc.StatusCode.OK


def test_no_credentials_but_the_key_are_good(gateway):
    printable = st.characters(min_codepoint=32, max_codepoint=126)

    @FEW
    @given(st.text(printable, max_size=200), st.sampled_from(["authorization", "x-api-key"]))
    def show(text: str, name: str) -> None:
        for value in (text, f"Bearer {text}", f"Bearer {KEY}{text or '!'}", f"bearer {KEY[: len(text) % len(KEY)]}"):
            code = status_of_call(gateway, "/ovi.gateway.v1.JobService/ListJobs", [b""], ((name, value),))
            assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED), value

    show()


def test_it_still_serves_and_nothing_was_unexpected(gateway):
    """The last test: after all of that."""
    wanted = pb.GenerationParameters(prompt="a bell")
    job = gateway.jobs.CreateJob(pb.CreateJobRequest(parameters=wanted), timeout=CALL_S, metadata=SHOWN).job
    *_, end = gateway.jobs.WatchJob(pb.WatchJobRequest(id=job.id), timeout=60, metadata=SHOWN)
    assert end.job.state == pb.JOB_STATE_COMPLETED
    assert gateway.service.process.poll() is None
    broken = [
        str(entry.get("exception"))[-1500:] for entry in gateway.service.log if entry["event"] == "unexpected error"
    ]
    assert not broken, "\n".join(broken[:3])
