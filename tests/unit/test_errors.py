"""The error table on the wire: what is raised in a service is what its caller catches."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from shared.errors import ERRORS, FieldViolation, Internal, InvalidRequest, OutOfMemory, OviError, Unavailable
from shared.grpc_client import error_of
from shared.grpc_server import CallInterceptor, Phase, Readiness
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore

TIMEOUT_S = 10


class CollectingServicer(vae_pb2_grpc.VaeServiceServicer):
    """Reads an upload to its end."""

    async def EncodeImage(self, request_iterator, context):
        async for _ in request_iterator:
            pass
        return vae_pb2.EncodeImageResponse()


class RaisingServicer(pb_grpc.FusionServiceServicer):
    """Raises what it is told to, before and after the first message of a stream."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def DescribeModel(self, request, context):
        raise self._error

    async def Denoise(self, request, context):
        yield pb.DenoiseResponse(step=pb.Step(index=1))
        raise self._error


async def _caught(error: Exception, phase: Phase = Phase.SERVING) -> tuple[OviError, OviError]:
    readiness = Readiness(["ovi.fusion.v1.FusionService"])
    await readiness.enter(phase)
    server = grpc.aio.server(interceptors=[CallInterceptor(readiness)])
    pb_grpc.add_FusionServiceServicer_to_server(RaisingServicer(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    caught = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.FusionServiceStub(channel)
        try:
            await stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            caught.append(error_of(failure))
        try:
            async for _ in stub.Denoise(pb.DenoiseRequest(), timeout=TIMEOUT_S):
                pass
        except grpc.aio.AioRpcError as failure:
            caught.append(error_of(failure))
    await server.stop(0)
    unary, stream = caught
    return unary, stream


@pytest.mark.parametrize(
    "kind", [kind for kind in ERRORS if kind is not InvalidRequest], ids=lambda kind: kind.__name__
)
def test_every_error_survives_the_wire(kind) -> None:
    for caught in asyncio.run(_caught(kind("what came, what to do"))):
        assert type(caught) is kind and caught.message == "what came, what to do"


def test_field_violations_survive_the_wire() -> None:
    violations = [FieldViolation("a.b", "got 1"), FieldViolation("c", "got ä")]
    for caught in asyncio.run(_caught(InvalidRequest(violations))):
        assert isinstance(caught, InvalidRequest) and list(caught.violations) == violations


def test_device_memory_is_told_apart_from_a_full_queue() -> None:
    for caught in asyncio.run(_caught(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))):
        assert type(caught) is OutOfMemory and "2 GiB" in caught.message


def test_unexpected_errors_show_an_id_and_nothing_else() -> None:
    for caught in asyncio.run(_caught(KeyError("secret"))):
        assert type(caught) is Internal and "secret" not in caught.message
        assert "internal error" in caught.message


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.DRAINING])
def test_no_work_outside_serving(phase) -> None:
    for caught in asyncio.run(_caught(KeyError("never raised"), phase)):
        assert type(caught) is Unavailable and phase.value in caught.message


async def _answers_to_garbage(garbage: bytes) -> list[OviError]:
    """What a unary call, a server stream, a client stream and the threads of a data port say."""
    readiness = Readiness(["ovi.vae.v1.VaeService"])
    await readiness.enter(Phase.SERVING)
    server = grpc.aio.server(interceptors=[CallInterceptor(readiness)])
    pb_grpc.add_FusionServiceServicer_to_server(RaisingServicer(KeyError("the servicer was called")), server)
    vae_pb2_grpc.add_VaeServiceServicer_to_server(CollectingServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    data = TensorServer(
        TensorStore(lease_s=60, max_bytes=1 << 20), host="127.0.0.1", port=0, advertise_host="127.0.0.1"
    )
    caught = []
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as control,
        grpc.aio.insecure_channel(data.address) as bulk,
    ):
        for call in (
            control.unary_unary("/ovi.fusion.v1.FusionService/DescribeModel")(garbage, timeout=TIMEOUT_S),
            control.unary_stream("/ovi.fusion.v1.FusionService/Denoise")(garbage, timeout=TIMEOUT_S),
            control.stream_unary("/ovi.vae.v1.VaeService/EncodeImage")(iter([garbage]), timeout=TIMEOUT_S),
            bulk.unary_unary("/ovi.common.v1.TensorService/Describe")(garbage, timeout=TIMEOUT_S),
            bulk.unary_stream("/ovi.common.v1.TensorService/Fetch")(garbage, timeout=TIMEOUT_S),
        ):
            try:
                if isinstance(call, grpc.aio.UnaryStreamCall):
                    await call.read()
                else:
                    await call
            except grpc.aio.AioRpcError as failure:
                caught.append(error_of(failure))
    await server.stop(0)
    data.stop(0)
    return caught


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f"], ids=["no field", "lying length"])
def test_bytes_that_are_no_message_are_invalid_requests(garbage, capfd) -> None:
    answers = asyncio.run(_answers_to_garbage(garbage))
    assert len(answers) == 5
    for answer in answers:
        assert isinstance(answer, InvalidRequest) and [v.field for v in answer.violations] == ["request"]
        assert "malformed" in answer.violations[0].description
    assert "Traceback" not in "".join(capfd.readouterr())
