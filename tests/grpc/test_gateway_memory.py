"""Devices, plans and memory modes through the gateway, over scripted stages."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors import safe_open
from typer.testing import CliRunner

from cli.main import app
from ovi.common.v1 import generation_pb2
from ovi.common.v1 import system_pb2 as system
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import OutOfMemory
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway, violations_of
from tests.grpc.scripted_stages import MODEL, ScriptedStages, clip_of, scripted_stages

GPU_0, GPU_1 = "GPU-0", "GPU-1"


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


@pytest.fixture
def stages(running) -> ScriptedStages:
    for stage in (running.text_encoder, running.fusion, running.vae):
        stage.system.reset()
    while not running.fusion.calls.empty():
        running.fusion.calls.get()
    running.fusion.automatic = True
    return running


@pytest.fixture(scope="module")
def gateway(running, tmp_path_factory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway") / "data", *running.flags) as gateway:
        yield gateway


def device(name: str, uuid: str, *, free: int, own: int, others: int) -> system.Device:
    return system.Device(
        name=name,
        model="NVIDIA H200",
        uuid=uuid,
        backend="cuda" if uuid else "cpu",
        total_bytes=100,
        free_bytes=free,
        own_bytes=own,
        others_bytes=others,
    )


def set_mode(gateway: GatewayUnderTest, mode: system.VramMode.ValueType, model: str = "") -> system.SetModeResponse:
    return gateway.system.SetMode(system.SetModeRequest(vram_mode=mode, model=model), timeout=WAIT_S)


def log_entries(gateway: GatewayUnderTest, event: str) -> list[dict[str, object]]:
    return [entry for entry in gateway.service.log if entry["event"] == event]


def test_a_mode_goes_to_the_stages_and_comes_back_with_the_clip(gateway, stages):
    job = gateway.create(vram_mode=system.VRAM_MODE_FP8)
    assert job.parameters.vram_mode == system.VRAM_MODE_FP8
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED and end.video.vram_mode == system.VRAM_MODE_FP8
    assert stages.fusion.next_call().request.vram_mode == system.VRAM_MODE_FP8
    assert stages.vae.decodes[-1].vram_mode == system.VRAM_MODE_FP8
    assert stages.vae.decodes[-1].provenance["vram_mode"] == "fp8"
    shown = CliRunner().invoke(app, ["jobs", "show", job.id, "--server", gateway.service.address])
    assert "fp8, lossy" in shown.output and "instead" not in shown.output
    with safe_open(gateway.data_dir / "artifacts" / job.id / "latents.safetensors", framework="pt") as kept:
        assert kept.metadata()["vram_mode"] == "fp8"


def test_without_a_mode_the_stages_choose_and_the_clip_says_what(gateway, stages):
    stages.fusion.system.mode = system.VRAM_MODE_STREAMED
    job = gateway.create()
    end = gateway.end_of(job.id)
    assert end.parameters.vram_mode == system.VRAM_MODE_UNSPECIFIED == stages.fusion.next_call().request.vram_mode
    assert stages.vae.decodes[-1].vram_mode == system.VRAM_MODE_UNSPECIFIED
    assert end.video.vram_mode == system.VRAM_MODE_STREAMED


def test_a_mode_without_a_name_is_refused_with_everything_else(gateway):
    with pytest.raises(grpc.RpcError) as refused:
        gateway.create(prompt=" ", vram_mode=77)
    said = violations_of(refused.value)
    assert set(said) == {"parameters.prompt", "parameters.vram_mode"}
    assert "got 77" in said["parameters.vram_mode"] and "VRAM_MODE_STREAMED" in said["parameters.vram_mode"]


def test_a_lowered_mode_is_a_new_attempt_and_told_by_the_clip(gateway, stages):
    stages.fusion.automatic = False
    job = gateway.create(steps=3, seed=4)
    call = stages.fusion.next_call()
    call.step()
    call.step()
    gateway.until(job.id, lambda now: now.progress.done == 2)
    watch = gateway.watch(job.id)
    assert next(watch).progress.done == 2
    call.lower(system.VRAM_MODE_FP8_OFFLOAD, "standard took 29.0 GiB of 28.0; fp8_offload takes 15.0")
    call.finish()
    states = list(watch)
    denoising = [now for now in states if now.progress.stage == pb.JOB_STAGE_DENOISE]
    assert {(now.attempts, now.progress.done) for now in denoising if now.attempts == 2} >= {(2, 0), (2, 1), (2, 3)}
    again = [now.progress.fraction for now in states if now.attempts == 2]
    assert again == sorted(again), "within an attempt progress never goes back"
    end = states[-1]
    assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2
    assert end.video.vram_mode == system.VRAM_MODE_FP8_OFFLOAD and gateway.download(job.id) == clip_of(4)
    assert stages.vae.decodes[-1].provenance["vram_mode"] == "fp8_offload"
    (told,) = log_entries(gateway, "memory ran out; the denoise begins again")
    assert "29.0 GiB of 28.0" in str(told["reason"]) and told["vram_mode"] == "fp8_offload"
    shown = CliRunner().invoke(app, ["jobs", "show", job.id, "--server", gateway.service.address])
    assert shown.exit_code == 0 and "fp8_offload, lossy" in shown.output
    with httpx.Client(base_url=gateway.http_url, timeout=30) as http:
        assert "ovi_mode_lowered_total 1.0" in http.get("/metrics").text


def test_memory_that_is_lacking_fails_the_job_with_the_numbers_and_at_once(gateway, stages):
    waits = len(log_entries(gateway, "waiting for a worker"))
    stages.fusion.refusals.put(OutOfMemory("the clip takes 29.0 GiB, 28.0 can be used"))
    end = gateway.end_of(gateway.create().id)
    assert end.state == pb.JOB_STATE_FAILED and end.error.code == "RESOURCE_EXHAUSTED"
    assert "takes 29.0 GiB, 28.0 can be used" in end.error.message
    assert len(log_entries(gateway, "waiting for a worker")) == waits


def test_what_cannot_fit_is_refused_before_it_is_queued(gateway, stages):
    plans = stages.fusion.system
    plans.total_bytes[system.VRAM_MODE_STANDARD] = 51
    num_jobs = len(gateway.jobs.ListJobs(pb.ListJobsRequest(), timeout=WAIT_S).jobs)
    wide = {"height": 32, "width": 128}
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as refused:
            gateway.create(vram_mode=system.VRAM_MODE_STANDARD, **wide)
        said = violations_of(refused.value)
        assert set(said) == {"parameters.vram_mode"}
        assert "got standard" in said["parameters.vram_mode"] and "takes 51 of 50" in said["parameters.vram_mode"]
    (asked,) = plans.plans
    assert (asked.model, asked.size.height, asked.size.width) == (MODEL, 32, 128), "the answer was kept"
    with pytest.raises(grpc.RpcError) as refused:
        gateway.create(**wide)
    assert "takes 51 of 50" in violations_of(refused.value)["parameters.model"]
    assert gateway.end_of(gateway.create(vram_mode=system.VRAM_MODE_FP8, **wide).id).state == pb.JOB_STATE_COMPLETED
    assert len(gateway.jobs.ListJobs(pb.ListJobsRequest(), timeout=WAIT_S).jobs) == num_jobs + 1


def test_a_job_waits_for_a_fusion_service_that_cannot_say_what_fits(gateway, stages):
    gateway.models.ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
    stages.fusion.stop()
    job = gateway.create(vram_mode=system.VRAM_MODE_STANDARD)
    assert job.state == pb.JOB_STATE_QUEUED
    stages.fusion.start()
    assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED


def test_devices_of_all_stages_are_told_once(gateway, stages):
    stages.fusion.system.devices = [
        device("cuda:0", GPU_0, free=30, own=40, others=29),
        device("cpu", "", free=60, own=10, others=30),
    ]
    stages.vae.system.devices = [
        device("cuda:0", GPU_1, free=90, own=5, others=5),
        device("cuda:1", GPU_0, free=30, own=20, others=48),
    ]
    stages.text_encoder.system.devices = [device("cpu", "", free=60, own=5, others=35)]
    devices = gateway.system.GetDevices(system.GetDevicesRequest(), timeout=WAIT_S).devices
    told = {(one.uuid, one.name): (one.free_bytes, one.own_bytes, one.others_bytes) for one in devices}
    # Of the 70 used of the first, fusion has 41 and the VAE 22, their contexts included: 7 are others'.
    assert told == {
        (GPU_0, "cuda:0"): (30, 60, 7),
        ("localhost/cpu", "cpu"): (60, 15, 25),
        (GPU_1, "cuda:0"): (90, 5, 5),
    }


def test_watch_names_what_is_full_and_who_is_away(stages, tmp_path):
    for stage in (stages.fusion, stages.vae, stages.text_encoder):
        stage.system.devices = [device("cuda:0", GPU_0, free=9, own=10, others=81)]
    stages.vae.stop()
    with running_gateway(tmp_path / "data", *stages.flags) as gateway:
        first = next(iter(gateway.system.WatchDevices(system.WatchDevicesRequest(), timeout=WAIT_S)))
        assert [one.own_bytes for one in first.devices] == [20], "two stages answer"
        away, full = sorted(first.warnings, key=lambda text: "full" in text)
        assert "vae" in away and stages.vae.address in away
        assert "91% full" in full and GPU_0 in full
        with httpx.Client(base_url=gateway.http_url, timeout=30) as http:
            families = text_string_to_metric_families(http.get("/metrics").text)
    stages.vae.start()
    values = {
        (
            sample.name,
            sample.labels.get("kind") or sample.labels.get("stage") or sample.labels.get("mode"),
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("device", GPU_0) == GPU_0
    }
    memory = {kind: values["ovi_device_memory_bytes", kind] for kind in ("total", "free", "used", "others")}
    assert memory == {"total": 100, "free": 9, "used": 91, "others": 71}
    reserved = {stage for name, stage in values if name == "ovi_device_reserved_bytes"}
    assert reserved == {"fusion", "text_encoder"} and values["ovi_device_reserved_bytes", "fusion"] == 10
    assert values["ovi_device_warnings_total", None] == 1 and values["ovi_vram_mode", "standard"] == 1


def test_plan_of_the_stack(gateway, stages):
    stages.fusion.system.total_bytes[system.VRAM_MODE_STANDARD] = 30
    stages.fusion.system.total_bytes[system.VRAM_MODE_STREAMED] = 12
    gateway.system.GetDevices(system.GetDevicesRequest(), timeout=WAIT_S)
    wish = system.GetPlanRequest(model=MODEL, size=generation_pb2.Size(height=64, width=64))
    plan = gateway.system.GetPlan(wish, timeout=WAIT_S).plan
    assert plan.vram_mode == system.VRAM_MODE_STANDARD and plan.fits
    assert (plan.total_bytes, plan.available_bytes, plan.device) == (50, 80, GPU_0), "no more than the device has"
    assert plan.component_bytes["fusion weights"] == 29 and plan.component_bytes["vae CUDA context"] == 1
    for stage in (stages.vae, stages.text_encoder):
        assert stage.system.plans[-1].vram_mode == system.VRAM_MODE_STANDARD, "the mode that fusion chose"
        assert stage.system.plans[-1].model == MODEL
    wish.vram_mode = system.VRAM_MODE_STREAMED
    assert gateway.system.GetPlan(wish, timeout=WAIT_S).plan.total_bytes == 11 + 3, "one at a time, three contexts"
    stages.vae.system.available_bytes = 9
    lacking = gateway.system.GetPlan(wish, timeout=WAIT_S).plan
    assert not lacking.fits and lacking.explanation == "vae: VRAM_MODE_STREAMED takes 10 of 9"


def test_a_plan_needs_every_stage(gateway, stages):
    stages.text_encoder.stop()
    with pytest.raises(grpc.RpcError) as refused:
        gateway.system.GetPlan(system.GetPlanRequest(), timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE and "text_encoder" in refused.value.details()
    stages.text_encoder.start()


def test_a_mode_is_switched_everywhere(gateway, stages):
    switched = set_mode(gateway, system.VRAM_MODE_FP8, MODEL)
    assert switched.plan.vram_mode == system.VRAM_MODE_FP8 and 0 <= switched.seconds < WAIT_S
    (fusion,), (vae,), (text) = (stage.system.switches for stage in (stages.fusion, stages.vae, stages.text_encoder))
    assert (fusion.vram_mode, fusion.model) == (system.VRAM_MODE_FP8, MODEL)
    assert [(one.vram_mode, one.model) for one in (vae, *text)] == [(system.VRAM_MODE_FP8, "")] * 2


def test_without_a_mode_the_best_that_the_whole_stack_has_memory_for_is_taken(gateway, stages):
    gateway.system.GetDevices(system.GetDevicesRequest(), timeout=WAIT_S)
    stages.fusion.system.mode = system.VRAM_MODE_ULTRA_LOW
    # Each of the three has room for it, but the device has not: 3 x 30 of 80.
    for stage in (stages.fusion, stages.vae, stages.text_encoder):
        stage.system.total_bytes[system.VRAM_MODE_STANDARD] = 30
    assert set_mode(gateway, system.VRAM_MODE_UNSPECIFIED).plan.vram_mode == system.VRAM_MODE_STREAMED
    assert stages.vae.system.switches[-1].vram_mode == system.VRAM_MODE_STREAMED
    stages.text_encoder.system.total_bytes[system.VRAM_MODE_STANDARD] = 20
    assert set_mode(gateway, system.VRAM_MODE_UNSPECIFIED).plan.vram_mode == system.VRAM_MODE_STANDARD
    stages.vae.system.available_bytes = 1
    with pytest.raises(grpc.RpcError) as refused:
        set_mode(gateway, system.VRAM_MODE_UNSPECIFIED)
    assert "vae: VRAM_MODE_ULTRA_LOW takes 10 of 1" in refused.value.details()


def test_nothing_is_switched_where_one_stage_would_not_fit(gateway, stages):
    stages.vae.system.available_bytes = 9
    with pytest.raises(grpc.RpcError) as refused:
        set_mode(gateway, system.VRAM_MODE_FP8)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "vae: VRAM_MODE_FP8 takes 10 of 9" in refused.value.details()
    assert not any(stage.system.switches for stage in (stages.fusion, stages.vae, stages.text_encoder))


def test_a_switch_that_ends_half_way_says_where(gateway, stages):
    stages.vae.system.refusal = OutOfMemory("the device filled up")
    with pytest.raises(grpc.RpcError) as refused:
        set_mode(gateway, system.VRAM_MODE_FP8)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "the vae service was not switched (the device filled up), but fusion was" in refused.value.details()
    assert not stages.text_encoder.system.switches


def test_a_mode_without_a_name_reaches_no_stage(gateway, stages):
    for call, request in (
        (gateway.system.GetPlan, system.GetPlanRequest(vram_mode=77)),
        (gateway.system.SetMode, system.SetModeRequest(vram_mode=77)),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=WAIT_S)
        assert "got 77" in violations_of(refused.value)["vram_mode"]
    assert not stages.fusion.system.plans
