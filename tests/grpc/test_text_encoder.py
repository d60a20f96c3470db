"""The text encoder service as a process, through real stubs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from ovi.common.v1 import generation_pb2
from ovi.text_encoder.v1 import text_encoder_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2_grpc as pb_grpc
from services.text_encoder.config import TextEncoderOptions
from services.text_encoder.engine import TextEngine
from services.text_encoder.servicer import TextEncoderServicer
from shared.device_worker import DeviceWorker
from shared.grpc_server import GrpcService, ListenConfig, serve
from shared.memory.modes import VramMode
from shared.service_main import EXIT_BAD_CONFIG, StageOptions
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import LOOPBACK_HOSTS, TensorResolver
from shared.variants import TEXT_ENCODER_FILE, TOKENIZER_FOLDER
from tests.service_process import free_port, running_service

_NAME = "ovi.text_encoder.v1.TextEncoderService"
_CALL_S = 30.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class _Service:
    channel: grpc.Channel
    stub: pb_grpc.TextEncoderServiceStub

    def encode(self, *prompts: str, **fields: int) -> pb.EncodeResponse:
        return self.stub.Encode(pb.EncodeRequest(prompts=prompts, **fields), timeout=_CALL_S)

    def num_encoded(self) -> int:
        return int(self.stub.DescribeModel(pb.DescribeModelRequest(), timeout=_CALL_S).num_encoded)


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path) -> Iterator[_Service]:
    flags = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu")
    with running_service("text_encoder", *flags) as process, process.channel() as channel:
        yield _Service(channel, pb_grpc.TextEncoderServiceStub(channel))
    assert process.process.returncode == 0


@pytest.fixture(scope="module")
def resolver() -> Iterator[TensorResolver]:
    resolver = TensorResolver.over_grpc()
    yield resolver
    resolver.close()


def _violations(error: grpc.RpcError) -> dict[str, str]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(error)
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    return {violation.field: violation.description for violation in bad.field_violations}


def test_rows_arrive_as_the_engine_makes_them(
    service: _Service, resolver: TensorResolver, tiny_checkpoint: Path
) -> None:
    engine = TextEngine.read(tiny_checkpoint, device=torch.device("cpu"), precision=torch.float32, cache_bytes=0)
    texts = ["A  cat. &lt;AUDCAP&gt;rain&lt;ENDAUDCAP&gt;", "", "Q" * 600]
    cleaned = ["A cat. Audio: rain", "", "Q" * 600]
    response = service.encode(*texts, prompt_format=generation_pb2.PROMPT_FORMAT_AUDIO_LINE)
    assert [item.cleaned_prompt for item in response.embeddings] == cleaned
    assert [item.truncated for item in response.embeddings] == [False, False, True]
    for item, expected in zip(response.embeddings, engine.encode(cleaned, 0), strict=True):
        rows = resolver.fetch(item.tensor, field="tensor", max_bytes=1 << 20)
        assert torch.isfinite(rows).all()
        torch.testing.assert_close(rows, expected.embedding.rows_LC, atol=1e-5, rtol=0)
    assert list(response.embeddings[2].tensor.spec.shape) == [512, 64]
    assert list(response.embeddings[1].tensor.spec.shape) == [1, 64]


def test_a_repeated_prompt_is_not_encoded_again(service: _Service, resolver: TensorResolver) -> None:
    before = service.num_encoded()
    first = service.encode("cache me", "and me", "cache  me", num_pinned=2)
    assert [item.cached for item in first.embeddings] == [False, False, True]
    assert service.num_encoded() == before + 2
    second = service.encode("and me", "cache me")
    assert [item.cached for item in second.embeddings] == [True, True]
    assert service.num_encoded() == before + 2
    tensors = [
        resolver.fetch(item.tensor, field="tensor", max_bytes=1 << 20)
        for item in (first.embeddings[1], second.embeddings[0])
    ]
    assert torch.equal(*tensors)
    assert first.embeddings[1].tensor.tensor_id != second.embeddings[0].tensor.tensor_id


def test_each_format_is_encoded_for_itself(service: _Service) -> None:
    text = "A dog. Audio: barking"
    tags = service.encode(text, prompt_format=generation_pb2.PROMPT_FORMAT_AUDCAP_TAGS).embeddings[0]
    line = service.encode(text, prompt_format=generation_pb2.PROMPT_FORMAT_AUDIO_LINE).embeddings[0]
    as_is = service.encode(text).embeddings[0]
    assert tags.cleaned_prompt == "A dog. <AUDCAP>barking<ENDAUDCAP>"
    assert (line.cleaned_prompt, as_is.cleaned_prompt) == (text, text)
    assert tags.tensor.spec.crc32c != line.tensor.spec.crc32c
    assert as_is.cached


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.EncodeRequest(), {"prompts": "got 0 prompts, allowed is 1 to 16"}),
        (pb.EncodeRequest(prompts=["x"] * 17), {"prompts": "got 17 prompts, allowed is 1 to 16"}),
        (pb.EncodeRequest(prompts=["ok", "ü" * 5001]), {"prompts[1]": "got 5001 characters, allowed is at most 5000"}),
        (pb.EncodeRequest(prompts=["x"], num_pinned=2), {"num_pinned": "allowed is 0 to the number of prompts, 1"}),
        (pb.EncodeRequest(prompts=["x"], prompt_format=9), {"prompt_format": "got 9"}),
        (
            pb.EncodeRequest(prompts=["ok", "x" * 6000, "y" * 5001], num_pinned=7, prompt_format=5),
            {"prompts[1]": "6000", "prompts[2]": "5001", "num_pinned": "got 7", "prompt_format": "got 5"},
        ),
    ],
)
def test_every_violation_is_named_and_the_service_goes_on(
    service: _Service, request_: pb.EncodeRequest, fields: dict[str, str]
) -> None:
    before = service.num_encoded()
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Encode(request_, timeout=_CALL_S)
    found = _violations(caught.value)
    assert found.keys() == fields.keys()
    for field, description in fields.items():
        assert description in found[field]
    assert service.num_encoded() == before
    assert len(service.encode("x" * 5000).embeddings) == 1


def test_the_model_is_described(service: _Service) -> None:
    model = service.stub.DescribeModel(pb.DescribeModelRequest(), timeout=_CALL_S)
    assert (model.text_dim, model.max_tokens, model.device, model.precision) == (64, 512, "cpu", "float32")
    assert len(model.fingerprint) == 33


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_service(service: _Service, version: str) -> None:
    call = service.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="*")])
    (response,) = call(requests, timeout=_CALL_S)
    assert _NAME in {entry.name for entry in response.list_services_response.service}


def _ended_service(checkpoints: Path) -> tuple[int, str]:
    """Exit status and log of a service that cannot start."""
    with running_service("text_encoder", "--checkpoints", str(checkpoints), serving=False) as service:
        status = service.process.wait(timeout=_CALL_S)
    return status, str(service.log)


def test_a_service_with_bad_files_ends_with_its_own_status(tmp_path: Path) -> None:
    status, log = _ended_service(tmp_path)
    assert status == EXIT_BAD_CONFIG
    assert f"{tmp_path / TOKENIZER_FOLDER / 'tokenizer.json'}: no such file" in log


def test_calls_are_refused_and_health_says_so_until_loading_has_ended(tiny_checkpoint: Path) -> None:
    """The real servicer and server, with a gate before the real load; the last signal drains the server."""
    stage = StageOptions(
        listen=ListenConfig("127.0.0.1", free_port(), grace_s=5.0),
        data_port=0,
        advertise_host="127.0.0.1",
        producer_hosts=LOOPBACK_HOSTS,
        checkpoints=tiny_checkpoint,
        device=torch.device("cpu"),
        precision=torch.float32,
        lease_s=60.0,
        tensor_store_bytes=3 * 64 * 4,
        max_pending=4,
        vram_mode=VramMode.STANDARD,
        memory_bytes=None,
    )

    async def scenario() -> None:
        gate = asyncio.Event()
        worker = DeviceWorker("test", max_pending=stage.max_pending)
        store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
        tensors = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
        servicer = TextEncoderServicer(TextEncoderOptions(stage, cache_bytes=1 << 20), worker, tensors)

        async def load() -> None:
            await gate.wait()
            await servicer.load()

        async def close() -> None:
            worker.close()
            tensors.stop(0)

        service = GrpcService(_NAME, lambda server: pb_grpc.add_TextEncoderServiceServicer_to_server(servicer, server))
        server = asyncio.ensure_future(serve(stage.listen, [service], load=load, close=close))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stage.listen.port}") as channel:
            stub = pb_grpc.TextEncoderServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=_NAME), timeout=_CALL_S, wait_for_ready=True)
            assert (await watch.read()).status == _NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Encode(pb.EncodeRequest(prompts=["x"]), timeout=_CALL_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "loading" in str(caught.value.details())
            gate.set()
            assert (await watch.read()).status == _SERVING
            await _fill_the_store(stub, store)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await watch.read()).status == _NOT_SERVING
            watch.cancel()
            await asyncio.wait_for(server, timeout=_CALL_S)

    asyncio.run(scenario())


async def _fill_the_store(stub: pb_grpc.TextEncoderServiceStub, store: TensorStore) -> None:
    """A store with room for three rows: "" takes one; a request of which only a part fits leaves nothing behind."""
    await stub.Encode(pb.EncodeRequest(prompts=[""]), timeout=_CALL_S)
    assert len(store) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Encode(pb.EncodeRequest(prompts=["", "", ""]), timeout=_CALL_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(store) == 1
    await stub.Encode(pb.EncodeRequest(prompts=["", ""]), timeout=_CALL_S)
    assert len(store) == 3


def test_a_pickle_bomb_ends_the_service_before_it_goes_off(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = tmp_path / TEXT_ENCODER_FILE
    tokenizer = tmp_path / TOKENIZER_FOLDER
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_bytes((tiny_checkpoint / TOKENIZER_FOLDER / "tokenizer.json").read_bytes())
    torch.save({"norm.weight": _Bomb(tmp_path / "exploded")}, weights)
    status, log = _ended_service(tmp_path)
    assert status == EXIT_BAD_CONFIG
    assert f"{weights}: refused, it holds more than tensors" in log
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))
