"""The error table on the wire: what is raised in a service is what its caller catches."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from shared.errors import ERRORS, FieldViolation, Internal, InvalidRequest, OutOfMemory, OviError, Unavailable
from shared.grpc_client import error_of
from shared.grpc_server import CallInterceptor, Phase, Readiness

TIMEOUT_S = 10


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
