"""Memory modes of a real text encoder service: planned, switched, refused; prompts in turns with other stages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from ovi.common.v1 import system_pb2, system_pb2_grpc
from ovi.text_encoder.v1 import text_encoder_pb2 as pb
from ovi.text_encoder.v1 import text_encoder_pb2_grpc as pb_grpc
from services.text_encoder.config import TextEncoderOptions
from services.text_encoder.servicer import TextEncoderServicer
from shared.device_worker import DeviceWorker
from shared.errors import OutOfMemory
from shared.memory.modes import TextEncoderPlace, VramMode
from shared.memory.turns import DeviceTurns
from shared.service_main import stage_options, stage_parser
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from tests.service_process import ServiceProcess, running_service

CALL_S = 30.0
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path) -> Iterator[ServiceProcess]:
    flags = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu", "--vram-mode", "fp8")
    with running_service("text_encoder", *flags) as process:
        yield process


@pytest.fixture
def system(service: ServiceProcess) -> Iterator[system_pb2_grpc.SystemServiceStub]:
    with service.channel() as channel:
        yield system_pb2_grpc.SystemServiceStub(channel)


def test_a_process_on_a_cpu_takes_nothing_of_a_device_in_any_mode(service, system) -> None:
    plan = system.GetPlan(system_pb2.GetPlanRequest(), timeout=CALL_S).plan
    assert (plan.vram_mode, plan.total_bytes, plan.fits) == (system_pb2.VRAM_MODE_FP8, 0, True)
    assert "on the CPU" in plan.explanation
    done = system.SetMode(system_pb2.SetModeRequest(vram_mode=system_pb2.VRAM_MODE_STANDARD), timeout=CALL_S)
    assert (done.plan.vram_mode, done.plan.fits) == (system_pb2.VRAM_MODE_STANDARD, True)
    with service.channel() as channel:
        response = pb_grpc.TextEncoderServiceStub(channel).Encode(pb.EncodeRequest(prompts=["rain"]), timeout=CALL_S)
    assert response.embeddings[0].cleaned_prompt == "rain"
    devices = system.GetDevices(system_pb2.GetDevicesRequest(), timeout=CALL_S).devices
    assert [device.backend for device in devices] == ["cpu"]


def test_all_gpu_on_a_cpu_is_refused_by_field_and_at_the_start(system, tiny_checkpoint: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        system.SetMode(system_pb2.SetModeRequest(vram_mode=system_pb2.VRAM_MODE_ALL_GPU), timeout=CALL_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "vram_mode" in caught.value.details()
    flags = ("--checkpoints", str(tiny_checkpoint), "--device", "cpu", "--vram-mode", "all_gpu")
    with running_service("text_encoder", *flags, serving=False) as service:
        assert service.process.wait(CALL_S) == 2


def test_prompts_are_encoded_in_turns_where_layers_are_streamed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The servicer without a server, its plans those of a GPU; this test has the device first."""
    arguments = ["--checkpoints", str(tiny_checkpoint), "--device", "cpu", "--vram-mode", "standard"]
    stage = stage_options(stage_parser("text_encoder", 0).parse_args(arguments))
    worker = DeviceWorker("text encoder", max_pending=4)
    tensors = TensorServer(TensorStore(lease_s=60, max_bytes=1 << 20), host="127.0.0.1", port=0, advertise_host="x")
    turns = DeviceTurns("a device", tmp_path / "turns")
    servicer = TextEncoderServicer(TextEncoderOptions(stage, cache_bytes=1 << 20), worker, tensors, turns)

    async def encode(prompt: str) -> pb.EncodeResponse:
        return await servicer.Encode(pb.EncodeRequest(prompts=[prompt]), None)  # type: ignore[arg-type]

    async def scenario() -> None:
        await servicer.load()
        first = await encode("rain")
        assert servicer._memory is not None and servicer._engine is not None
        servicer._memory = replace(servicer._memory, device=GPU, budget_bytes=1 << 40)
        plan = await servicer.set_mode(VramMode.STREAMED, "")
        assert plan.vram_mode == system_pb2.VRAM_MODE_STREAMED
        assert servicer._engine.place is TextEncoderPlace.STREAMED
        async with contextlib.AsyncExitStack() as mine:
            await mine.enter_async_context(turns.turn())
            cached = await encode("rain")
            assert cached.embeddings[0].cached, "what is known needs no device"
            assert cached.embeddings[0].tensor.spec.crc32c == first.embeddings[0].tensor.spec.crc32c
            waiting = asyncio.ensure_future(encode("snow"))
            done, _ = await asyncio.wait([waiting], timeout=0.3)
            assert not done
            await mine.aclose()
            async with asyncio.timeout(CALL_S):
                assert not (await waiting).embeddings[0].cached
        servicer._memory = replace(servicer._memory, budget_bytes=0)
        with pytest.raises(OutOfMemory, match="may be used"):
            await servicer.set_mode(VramMode.STANDARD, "")
        assert servicer._engine.place is TextEncoderPlace.STREAMED
        assert (await encode("hail")).embeddings[0].cleaned_prompt == "hail"

    try:
        asyncio.run(scenario())
    finally:
        worker.close()
        tensors.stop(0)
