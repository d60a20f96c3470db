"""Memory modes of a whole stack: asked for by a job, switched while it runs, refused where they cannot be."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file

from ovi.common.v1 import system_pb2 as pb
from ovi.common.v1 import system_pb2_grpc as pb_grpc
from ovi.gateway.v1 import gateway_pb2
from tests.e2e.conftest import RunningStack

TIMEOUT_S = 120


@pytest.fixture
def system(stack: RunningStack) -> pb_grpc.SystemServiceStub:
    return pb_grpc.SystemServiceStub(stack.channel("gateway"))


def made(stack: RunningStack, mode: pb.VramMode.ValueType) -> tuple[gateway_pb2.Video, dict[str, torch.Tensor]]:
    """A finished clip and its latents."""
    job = stack.finished(stack.create("a bell in the fog", seed=3, vram_mode=mode).id)
    assert job.state == gateway_pb2.JOB_STATE_COMPLETED, job.error
    (path,) = Path(stack.data_dir).glob(f"**/{job.id}/latents.safetensors")
    return job.video, load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def modes(stack: RunningStack) -> set[pb.VramMode.ValueType]:
    """The present mode of every stage."""
    request = pb.GetPlanRequest()
    return {
        pb_grpc.SystemServiceStub(stack.channel(name)).GetPlan(request, timeout=TIMEOUT_S).plan.vram_mode
        for name in ("text_encoder", "fusion", "vae")
    }


def test_a_job_may_ask_for_a_mode_and_says_which_it_had(stack: RunningStack) -> None:
    video, standard = made(stack, pb.VRAM_MODE_UNSPECIFIED)
    assert video.vram_mode == pb.VRAM_MODE_STANDARD
    video, streamed = made(stack, pb.VRAM_MODE_STREAMED)
    assert video.vram_mode == pb.VRAM_MODE_STREAMED and same(streamed, standard)
    video, lossy = made(stack, pb.VRAM_MODE_ULTRA_LOW)
    assert video.vram_mode == pb.VRAM_MODE_ULTRA_LOW and not same(lossy, standard)
    assert modes(stack) == {pb.VRAM_MODE_STANDARD}


def test_a_mode_that_cannot_be_is_refused_before_the_queue(stack: RunningStack) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stack.create("a bell", vram_mode=pb.VRAM_MODE_ALL_GPU)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "vram_mode" in caught.value.details() and "CPU" in caught.value.details()


def test_a_running_stack_is_switched_and_back(stack: RunningStack, system: pb_grpc.SystemServiceStub) -> None:
    _, standard = made(stack, pb.VRAM_MODE_UNSPECIFIED)
    pids = {name: stack.pid(name) for name in ("text_encoder", "fusion", "vae")}
    answer = system.SetMode(pb.SetModeRequest(vram_mode=pb.VRAM_MODE_STREAMED), timeout=TIMEOUT_S)
    assert answer.plan.vram_mode == pb.VRAM_MODE_STREAMED and answer.plan.fits
    try:
        assert modes(stack) == {pb.VRAM_MODE_STREAMED}
        video, streamed = made(stack, pb.VRAM_MODE_UNSPECIFIED)
        assert video.vram_mode == pb.VRAM_MODE_STREAMED and same(streamed, standard)
    finally:
        system.SetMode(pb.SetModeRequest(vram_mode=pb.VRAM_MODE_STANDARD), timeout=TIMEOUT_S)
    assert modes(stack) == {pb.VRAM_MODE_STANDARD}
    assert {name: stack.pid(name) for name in pids} == pids, "nothing was restarted"


def test_devices_and_plans_of_the_stack_are_told(system: pb_grpc.SystemServiceStub) -> None:
    devices = system.GetDevices(pb.GetDevicesRequest(), timeout=TIMEOUT_S).devices
    assert [device.backend for device in devices if device.backend == "cpu"] == ["cpu"], "one, though three stages tell"
    plan = system.GetPlan(pb.GetPlanRequest(vram_mode=pb.VRAM_MODE_STREAMED), timeout=TIMEOUT_S).plan
    assert plan.fits and plan.total_bytes > 0
    watch = system.WatchDevices(pb.WatchDevicesRequest(), timeout=TIMEOUT_S)
    assert next(iter(watch)).devices
    watch.cancel()
