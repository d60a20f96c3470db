"""Memory modes of a real fusion service: planned, switched, refused, asked for by a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
import torch

from ovi.common.v1 import generation_pb2, system_pb2, system_pb2_grpc
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.planner import fusion_sizes
from shared.errors import EXIT_BAD_CONFIG
from shared.grpc_client import error_of
from shared.memory.choose import plan_fusion
from shared.memory.modes import VramMode
from shared.memory.sizes import ClipTokens
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from tests.fusion_checkpoint import SMALL, write_variant
from tests.service_process import ServiceProcess, running_service

MODEL = "720x720_5s"
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_variant(folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def service(checkpoints) -> Iterator[ServiceProcess]:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "standard", "--grace-s", "1")
    with running_service("fusion", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def system(service) -> Iterator[system_pb2_grpc.SystemServiceStub]:
    with service.channel() as channel:
        yield system_pb2_grpc.SystemServiceStub(channel)


@pytest.fixture(scope="module")
def producer() -> Iterator[TensorServer]:
    store = TensorStore(lease_s=600, max_bytes=1 << 28)
    server = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    yield server
    server.stop(0)


def denoise(service, producer, mode: system_pb2.VramMode.ValueType) -> tuple[torch.Tensor, pb.Result]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(6, SMALL.text_dim, generator=generator) for _ in range(3)]
    refs = [producer.publish(producer.store.put(tensor)) for tensor in rows]
    request = pb.DenoiseRequest(
        model=MODEL,
        height=64,
        width=64,
        options=generation_pb2.SamplingOptions(num_inference_steps=2, slg_layer=1, seed=7),
        prompt=refs[0],
        video_negative=refs[1],
        audio_negative=refs[2],
        vram_mode=mode,
    )
    with service.channel() as channel:
        *_, last = pb_grpc.FusionServiceStub(channel).Denoise(request, timeout=TIMEOUT_S)
    resolver = TensorResolver.over_grpc()
    latent = resolver.fetch(last.result.video_latent, field="latent", max_bytes=1 << 28)
    resolver.close()
    return latent, last.result


def described(service) -> system_pb2.MemoryPlan:
    with service.channel() as channel:
        stub = pb_grpc.FusionServiceStub(channel)
        return stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S).memory


def test_a_job_says_in_which_mode_it_was_made(service, producer) -> None:
    standard, result = denoise(service, producer, system_pb2.VRAM_MODE_UNSPECIFIED)
    assert result.vram_mode == system_pb2.VRAM_MODE_STANDARD
    streamed, result = denoise(service, producer, system_pb2.VRAM_MODE_STREAMED)
    assert result.vram_mode == system_pb2.VRAM_MODE_STREAMED
    assert torch.equal(standard, streamed)
    lossy, result = denoise(service, producer, system_pb2.VRAM_MODE_ULTRA_LOW)
    assert result.vram_mode == system_pb2.VRAM_MODE_ULTRA_LOW
    assert not torch.equal(standard, lossy)
    assert described(service).vram_mode == system_pb2.VRAM_MODE_STANDARD


def test_plans_are_given_without_loading(system) -> None:
    plans = {
        mode: system.GetPlan(system_pb2.GetPlanRequest(vram_mode=mode), timeout=TIMEOUT_S).plan
        for mode in (system_pb2.VRAM_MODE_STANDARD, system_pb2.VRAM_MODE_STREAMED, system_pb2.VRAM_MODE_ULTRA_LOW)
    }
    for mode, plan in plans.items():
        assert plan.vram_mode == mode and plan.fits
        assert plan.total_bytes == sum(plan.component_bytes.values()) > 0
        assert MODEL in plan.explanation


def test_a_switch_holds_until_the_next(service, system, producer) -> None:
    expected, _ = denoise(service, producer, system_pb2.VRAM_MODE_FP8)
    answer = system.SetMode(system_pb2.SetModeRequest(vram_mode=system_pb2.VRAM_MODE_FP8), timeout=TIMEOUT_S)
    assert answer.plan.vram_mode == system_pb2.VRAM_MODE_FP8 and answer.seconds > 0
    assert described(service).vram_mode == system_pb2.VRAM_MODE_FP8
    latent, result = denoise(service, producer, system_pb2.VRAM_MODE_UNSPECIFIED)
    assert result.vram_mode == system_pb2.VRAM_MODE_FP8
    assert torch.equal(latent, expected)
    system.SetMode(system_pb2.SetModeRequest(vram_mode=system_pb2.VRAM_MODE_STANDARD), timeout=TIMEOUT_S)
    assert described(service).vram_mode == system_pb2.VRAM_MODE_STANDARD


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (system_pb2.SetModeRequest(vram_mode=99), grpc.StatusCode.INVALID_ARGUMENT, "vram_mode"),  # type: ignore[arg-type]
        (system_pb2.SetModeRequest(vram_mode=system_pb2.VRAM_MODE_ALL_GPU), grpc.StatusCode.INVALID_ARGUMENT, "CPU"),
        (system_pb2.SetModeRequest(model="none"), grpc.StatusCode.INVALID_ARGUMENT, "model"),
    ],
)
def test_wrong_switches_are_refused_and_change_nothing(service, system, request_, code, field) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        system.SetMode(request_, timeout=TIMEOUT_S)
    assert caught.value.code() == code and field in caught.value.details()
    assert described(service).vram_mode == system_pb2.VRAM_MODE_STANDARD


def test_a_device_is_told(system) -> None:
    devices = system.GetDevices(system_pb2.GetDevicesRequest(), timeout=TIMEOUT_S).devices
    assert [device.backend for device in devices][-1] == "cpu"
    assert all(0 < device.free_bytes < device.total_bytes for device in devices)


def test_too_little_memory_is_refused_up_front_with_the_numbers(tmp_path, producer) -> None:
    """A limit that streaming keeps to and standard does not, then one that nothing keeps to."""
    deep = replace(SMALL, num_layers=8)
    write_variant(tmp_path, MODEL, config=deep)
    clip = ClipTokens.of_clip(121, 64, 64, audio_length=157)
    need = plan_fusion(fusion_sizes(deep, 4), clip, VramMode.STANDARD, None).components.reserved
    flags = ("--checkpoints", str(tmp_path), "--device", "cpu", "--vram-mode", "streamed", "--grace-s", "1")
    with running_service("fusion", *flags, "--memory-gib", str((need - 1) / 2**30)) as service:
        with pytest.raises(grpc.RpcError) as caught:
            denoise(service, producer, system_pb2.VRAM_MODE_STANDARD)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "streamed fits" in caught.value.details() and "GiB" in caught.value.details()
        assert error_of(caught.value).reason == "OUT_OF_MEMORY"
        denoise(service, producer, system_pb2.VRAM_MODE_UNSPECIFIED)
    with running_service("fusion", *flags, "--memory-gib", "0.01", serving=False) as service:
        assert service.process.wait(TIMEOUT_S) == EXIT_BAD_CONFIG
        reasons = [str(entry.get("reason")) for entry in service.log if entry["event"] == "cannot start"]
        assert reasons and "may be used; no mode fits" in reasons[0]
