"""Store, server and resolver over a real connection, with honest and lying producers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from ovi.common.v1 import tensor_pb2 as pb
from ovi.common.v1 import tensor_pb2_grpc as pb_grpc
from shared.errors import CorruptTensor, InvalidRequest, ReferenceLost, ResourceExhausted
from shared.grpc_server import CONNECTION_OPTIONS
from shared.tensors.framing import chunks_of, safetensors_header, spec_of, spec_to_proto
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver

LIMIT = 64 << 20


class Clock:
    """A clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock) -> Iterator[TensorServer]:
    store = TensorStore(lease_s=60, max_bytes=8 << 20, clock=clock)
    server = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    yield server
    server.stop(0)


@pytest.fixture
def resolver() -> Iterator[TensorResolver]:
    resolver = TensorResolver.over_grpc()
    yield resolver
    resolver.close()


def test_a_port_takes_so_many_connections_and_lets_go_of_silent_ones(monkeypatch) -> None:
    """All ports are made with the same options; here with smaller numbers."""
    small = {"grpc.max_allowed_incoming_connections": 3, "grpc.server_handshake_timeout_ms": 1000}
    options = dict(CONNECTION_OPTIONS)
    assert small.keys() < options.keys()
    monkeypatch.setattr("shared.tensors.service.CONNECTION_OPTIONS", list((options | small).items()))
    server = TensorServer(TensorStore(lease_s=60, max_bytes=1024), host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    try:
        with contextlib.ExitStack() as closing:
            host, _, port = server.address.partition(":")
            clients = [closing.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(5)]
            greeted = [client.recv(1 << 16) != b"" for client in clients]
            assert greeted == [True, True, True, False, False]
            for client in clients[:3]:
                while client.recv(1 << 16):  # up to the end: they have said nothing
                    pass
    finally:
        server.stop(0)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("gateway-0.gateway", True),
        ("gateway-12.gateway", True),
        ("gateway", False),
        ("gateway-0.gateway.evil.example", False),
        ("evilgateway", False),
        ("vae", True),
    ],
)
def test_producers_may_be_named_with_all_hosts_below_a_name(host, allowed) -> None:
    resolver = TensorResolver.over_grpc({"vae", "*.gateway"})
    ref = pb.TensorRef(
        address=f"{host}:1",
        tensor_id="x",
        spec=spec_to_proto(spec_of(torch.zeros(1))),
        transports=[pb.TRANSPORT_GRPC_STREAM],
    )
    # Nobody is there in any case: whoever may be called is looked for.
    with pytest.raises(ReferenceLost if allowed else InvalidRequest):
        resolver.fetch(ref, field="x", max_bytes=LIMIT, timeout_s=10)
    resolver.close()


def test_fetch_release_and_describe(server, resolver) -> None:
    tensor = torch.randn(300, 1001).bfloat16()
    ref = server.publish(server.store.put(tensor))
    assert torch.equal(resolver.fetch(ref, field="x", max_bytes=LIMIT), tensor)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.TensorServiceStub(channel)
        described = stub.Describe(pb.DescribeRequest(tensor_id=ref.tensor_id))
        assert described.spec == ref.spec and described.lease_expire_time == ref.lease_expire_time
        assert stub.Release(pb.ReleaseRequest(tensor_id=ref.tensor_id)).was_held
        assert not stub.Release(pb.ReleaseRequest(tensor_id=ref.tensor_id)).was_held
    assert len(server.store) == 0
    with pytest.raises(ReferenceLost, match=ref.tensor_id):
        resolver.fetch(ref, field="x", max_bytes=LIMIT)


def test_lease_ends_by_time(server, resolver, clock) -> None:
    ref = server.publish(server.store.put(torch.zeros(4)))
    clock.now += 59
    resolver.fetch(ref, field="x", max_bytes=LIMIT)
    clock.now += 2
    with pytest.raises(ReferenceLost):
        resolver.fetch(ref, field="x", max_bytes=LIMIT)


def test_store_is_bounded(server) -> None:
    server.store.put(torch.zeros(5 << 20, dtype=torch.uint8))
    with pytest.raises(ResourceExhausted, match="do not fit"):
        server.store.put(torch.zeros(5 << 20, dtype=torch.uint8))


def test_dead_producer_is_a_lost_reference(server, resolver) -> None:
    ref = server.publish(server.store.put(torch.zeros(4)))
    server.stop(0)
    with pytest.raises(ReferenceLost, match="cannot be reached"):
        resolver.fetch(ref, field="x", max_bytes=LIMIT)
    resolver.release(ref)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"address": "192.0.2.1:50000"}, "x.address"),
        ({"address": "127.0.0.1:99999"}, "x.address"),
        ({"address": "unix:///etc/passwd"}, "x.address"),
        ({"tensor_id": "../../x"}, "x.tensor_id"),
        ({"tensor_id": ""}, "x.tensor_id"),
        ({"transports": [pb.TRANSPORT_CUDA_IPC]}, "x.transports"),
        ({"transports": [77]}, "x.transports"),
    ],
)
def test_references_are_checked_before_any_connection(server, resolver, change, field) -> None:
    ref = server.publish(server.store.put(torch.zeros(4)))
    for name, value in change.items():
        if name == "transports":
            del ref.transports[:]
            ref.transports.extend(value)
        else:
            setattr(ref, name, value)
    with pytest.raises(InvalidRequest) as caught:
        resolver.fetch(ref, field="x", max_bytes=LIMIT)
    assert [v.field for v in caught.value.violations] == [field]


class ScriptedProducer(pb_grpc.TensorServiceServicer):
    """A peer that answers Fetch with given messages."""

    def __init__(self, messages: list[pb.FetchResponse]) -> None:
        self._messages = messages

    def Fetch(self, request, context):
        yield from self._messages


@contextlib.contextmanager
def scripted(messages: list[pb.FetchResponse]) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_TensorServiceServicer_to_server(ScriptedProducer(messages), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_lying_producers_are_refused(resolver) -> None:
    tensor = torch.randn(1000)
    spec = spec_of(tensor)
    (data,) = chunks_of(tensor)
    header = pb.FetchResponse(
        header=pb.TensorHeader(spec=spec_to_proto(spec), safetensors_header=safetensors_header(spec))
    )
    other = spec_of(torch.randn(2000))
    wrong = pb.FetchResponse(
        header=pb.TensorHeader(spec=spec_to_proto(other), safetensors_header=safetensors_header(other))
    )
    chunk = pb.FetchResponse(chunk=data)
    for messages, match in [
        ([], "does not begin with a header"),
        ([chunk], "does not begin with a header"),
        ([wrong, chunk], "announced as"),
        ([header], "ended after 0"),
        ([header, chunk, chunk], "oversized"),
        ([header, header, chunk], "second header"),
        ([header, pb.FetchResponse(chunk=bytes(4000))], "checksum"),
    ]:
        with scripted(messages) as address:
            ref = pb.TensorRef(
                address=address,
                tensor_id="t",
                spec=spec_to_proto(spec),
                transports=[pb.TRANSPORT_GRPC_STREAM],
            )
            with pytest.raises(CorruptTensor, match=match):
                resolver.fetch(ref, field="x", max_bytes=LIMIT)
