"""Memory modes of a real VAE service: planned, switched, refused, asked for by a job, in turns with other stages."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from ovi.common.v1 import generation_pb2, system_pb2, system_pb2_grpc, tensor_pb2
from ovi.vae.v1 import vae_pb2 as pb
from ovi.vae.v1 import vae_pb2_grpc as pb_grpc
from services.vae.config import VaeOptions
from services.vae.engine import VaeEngine
from services.vae.memory import VaeMemory
from services.vae.ops import Kernels
from services.vae.servicer import VaeServicer
from shared.device_worker import DeviceWorker
from shared.errors import EXIT_BAD_CONFIG, OutOfMemory
from shared.group.ranks import Ranks
from shared.grpc_client import error_of
from shared.memory.modes import VramMode
from shared.memory.turns import DeviceTurns
from shared.service_main import stage_options, stage_parser
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from tests.service_process import ServiceProcess, running_service
from tests.vae_checkpoint import clip_content, write_checkpoint

TIMEOUT_S = 60
STANDARD, STREAMED = system_pb2.VRAM_MODE_STANDARD, system_pb2.VRAM_MODE_STREAMED


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def service(checkpoints: Path) -> Iterator[ServiceProcess]:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "standard")
    with running_service("vae", *flags) as service:
        yield service


@pytest.fixture
def channel(service: ServiceProcess) -> Iterator[grpc.Channel]:
    """The service goes back to standard after every test."""
    with service.channel() as channel:
        yield channel
        system = system_pb2_grpc.SystemServiceStub(channel)
        system.SetMode(system_pb2.SetModeRequest(vram_mode=STANDARD), timeout=TIMEOUT_S)


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.VaeServiceStub:
    return pb_grpc.VaeServiceStub(channel)


@pytest.fixture
def system(channel: grpc.Channel) -> system_pb2_grpc.SystemServiceStub:
    return system_pb2_grpc.SystemServiceStub(channel)


@pytest.fixture(scope="module")
def put() -> Iterator[Callable[[torch.Tensor], tensor_pb2.TensorRef]]:
    store = TensorStore(lease_s=600, max_bytes=1 << 28)
    server = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    yield lambda tensor: server.publish(store.put(tensor))
    server.stop(0)


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


VIDEO, AUDIO = latent(48, 3, 4, 2), latent(6, 20)


def clip(stub: pb_grpc.VaeServiceStub, put, mode: system_pb2.VramMode.ValueType = 0) -> tuple[int, bytes]:
    request = pb.DecodeClipRequest(video_latent=put(VIDEO), audio_latent=put(AUDIO), vram_mode=mode)
    events = list(stub.DecodeClip(request, timeout=TIMEOUT_S))
    return clip_content(io.BytesIO(b"".join(event.chunk for event in events)))


def frames(stub: pb_grpc.VaeServiceStub, put) -> bytes:
    request = pb.DecodeVideoRequest(video_latent=put(VIDEO))
    return b"".join(part.chunk for part in stub.DecodeVideo(request, timeout=TIMEOUT_S))


def test_the_mode_is_switched_there_and_back_and_clips_stay_the_same(stub, system, put) -> None:
    expected = clip(stub, put), frames(stub, put)
    for mode in (STREAMED, STANDARD, system_pb2.VRAM_MODE_ULTRA_LOW):
        done = system.SetMode(system_pb2.SetModeRequest(vram_mode=mode), timeout=TIMEOUT_S)
        assert (done.plan.vram_mode, done.plan.fits, done.plan.allocation) == (mode, True, "single")
        assert 0 < done.seconds < TIMEOUT_S
        assert (clip(stub, put), frames(stub, put)) == expected
    assert clip(stub, put, STREAMED) == expected[0]
    plan = system.GetPlan(system_pb2.GetPlanRequest(), timeout=TIMEOUT_S).plan
    assert plan.vram_mode == system_pb2.VRAM_MODE_ULTRA_LOW, "a job's mode is not the service's"


def test_plans_say_what_is_taken(system) -> None:
    resident, hosted = (
        system.GetPlan(system_pb2.GetPlanRequest(vram_mode=mode), timeout=TIMEOUT_S).plan
        for mode in (STANDARD, STREAMED)
    )
    assert resident.total_bytes == sum(resident.component_bytes.values()) > hosted.total_bytes
    assert "stay on the device" in resident.explanation and "960 x 960" in resident.explanation
    small = system_pb2.GetPlanRequest(size=generation_pb2.Size(height=64, width=96))
    assert system.GetPlan(small, timeout=TIMEOUT_S).plan.total_bytes < resident.total_bytes


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda system: system.GetPlan(system_pb2.GetPlanRequest(model="720x720_5s")), "model"),
        (
            lambda system: system.GetPlan(system_pb2.GetPlanRequest(size=generation_pb2.Size(height=7, width=32))),
            "size",
        ),
        (lambda system: system.GetPlan(system_pb2.GetPlanRequest(vram_mode=99)), "vram_mode"),
        (lambda system: system.SetMode(system_pb2.SetModeRequest(vram_mode=6)), "vram_mode"),
        (lambda system: system.SetMode(system_pb2.SetModeRequest(model="x")), "model"),
    ],
)
def test_wrong_wishes_are_refused_by_field(system, call, field) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(system)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in caught.value.details()


def test_a_job_in_a_mode_that_cannot_be_had_is_refused(stub, put) -> None:
    for mode in (system_pb2.VRAM_MODE_ALL_GPU, 99):
        with pytest.raises(grpc.RpcError) as caught:
            clip(stub, put, mode)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_does_not_fit_is_refused_with_numbers_and_the_service_lives(checkpoints, put) -> None:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "streamed", "--memory-gib")
    with running_service("vae", *flags, "0.4") as service, service.channel() as channel:
        stub, system = pb_grpc.VaeServiceStub(channel), system_pb2_grpc.SystemServiceStub(channel)
        request = pb.DecodeClipRequest(video_latent=put(latent(48, 1, 256, 256)), audio_latent=put(AUDIO))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.DecodeClip(request, timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_of(caught.value)
        assert isinstance(error, OutOfMemory)
        assert "for pictures of 4096 x 4096, 0.4 GiB may be used" in error.message
        size = generation_pb2.Size(height=4096, width=4096)
        plan = system.GetPlan(system_pb2.GetPlanRequest(size=size), timeout=TIMEOUT_S).plan
        assert not plan.fits and plan.total_bytes > plan.available_bytes and "0.4 GiB may be used" in plan.explanation
        assert clip(stub, put)[0] == 9


def test_less_than_a_mode_needs_ends_the_start_with_numbers(checkpoints) -> None:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "streamed", "--memory-gib", "0.2")
    with running_service("vae", *flags, serving=False) as service:
        assert service.process.wait(TIMEOUT_S) == EXIT_BAD_CONFIG
    assert "0.2 GiB may be used" in str(service.log)


def test_all_gpu_on_a_cpu_is_refused_at_the_start(checkpoints) -> None:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "all_gpu")
    with running_service("vae", *flags, serving=False) as service:
        assert service.process.wait(TIMEOUT_S) == EXIT_BAD_CONFIG
    assert "got all_gpu" in str(service.log)


def test_a_decode_waits_for_its_turn_and_the_next_stage_for_the_decode_only(checkpoints, put, tmp_path) -> None:
    """The servicer without a server: this test has the device first, then the decode, whose file nobody waits for."""
    stage = stage_options(stage_parser("vae", 0).parse_args(["--checkpoints", str(checkpoints), "--device", "cpu"]))
    options = VaeOptions(stage, 1, Kernels.AUTO, Ranks.from_environment({}))
    engine = VaeEngine.load(options, VaeMemory.of(options), VramMode.STREAMED)
    worker, resolver = DeviceWorker("vae", max_pending=4), TensorResolver.over_grpc()
    turns = DeviceTurns("a device", tmp_path / "turns")
    servicer = VaeServicer(lambda: engine, worker, resolver, None, options, turns)  # type: ignore[arg-type]
    request = pb.DecodeClipRequest(video_latent=put(VIDEO), audio_latent=put(AUDIO))

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as mine:
            await mine.enter_async_context(turns.turn())
            events = servicer.DecodeClip(request, None)  # type: ignore[arg-type]
            first = asyncio.ensure_future(anext(events))
            # Jobs of the device thread that need no turn are done meanwhile; this decode is none of them.
            assert await worker.run(lambda: worker.num_pending) == 1
            done, _ = await asyncio.wait([first], timeout=0.3)
            assert not done
            await mine.aclose()
            async with asyncio.timeout(TIMEOUT_S):
                event = await first
                while event.WhichOneof("event") == "progress":
                    event = await anext(events)
                async with turns.turn():
                    kinds = [event.WhichOneof("event")] + [each.WhichOneof("event") async for each in events]
        assert kinds == ["chunk", "summary"]

    try:
        asyncio.run(scenario())
    finally:
        worker.close()
        resolver.close()
