"""Several workers of a stage: jobs are spread over them, and one that fails is made up for by another."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from ovi.common.v1 import system_pb2 as system
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import OutOfMemory
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedFusion, ScriptedStages, clip_of, scripted_stages


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


@pytest.fixture
def fusions(stages) -> Iterator[tuple[ScriptedFusion, ScriptedFusion]]:
    other = ScriptedFusion()
    for fusion in (stages.fusion, other):
        fusion.automatic = False
    yield stages.fusion, other
    other.close()


@pytest.fixture
def gateway(stages, fusions, tmp_path) -> Iterator[GatewayUnderTest]:
    addresses = ",".join(fusion.address for fusion in fusions)
    with running_gateway(tmp_path / "data", *stages.flags, "--fusion", addresses) as gateway:
        yield gateway


def test_jobs_are_spread_and_each_gets_its_own_latents(gateway, fusions):
    jobs = [gateway.create(seed=seed, prompt=f"clip {seed}") for seed in (1, 2)]
    calls = [fusion.next_call() for fusion in fusions]
    assert {call.request.options.seed for call in calls} == {1, 2}, "each service has one"
    for call in reversed(calls):
        call.finish()
    for job, seed in zip(jobs, (1, 2), strict=True):
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
        assert gateway.download(job.id) == clip_of(seed)


def test_what_does_not_fit_one_is_tried_once_on_another(gateway, fusions):
    first, second = fusions
    job = gateway.create(seed=3)
    call = first.next_call()
    call.step()
    gateway.until(job.id, lambda now: now.progress.done == 1)
    call.fail(OutOfMemory("29.0 GiB of 28.0"))
    second.next_call().finish()
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2 and gateway.download(job.id) == clip_of(3)
    (setback,) = end.setbacks
    assert (setback.stage, setback.worker) == (pb.JOB_STAGE_DENOISE, first.address)

    job = gateway.create(seed=4)
    calls = []
    for fusion in (second, first):  # what the first had no memory for is remembered
        calls.append(fusion.next_call())
        calls[-1].fail(OutOfMemory(f"{len(calls)} times too small"))
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_FAILED and "2 times too small" in end.error.message
    assert first.calls.empty() and second.calls.empty(), "nobody is asked twice"


def test_another_worker_takes_over_from_one_that_died(gateway, fusions):
    first, second = fusions
    job = gateway.create(seed=5)
    first.next_call().step()
    gateway.until(job.id, lambda now: now.progress.done == 1)
    first.stop()
    second.next_call().finish()
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2 and gateway.download(job.id) == clip_of(5)
    second.automatic = True
    assert gateway.end_of(gateway.create(seed=6).id).state == pb.JOB_STATE_COMPLETED
    with httpx.Client(base_url=gateway.http_url, timeout=30) as http:
        assert http.get("/readyz").status_code == 200, "one is enough"
    watch = gateway.system.WatchDevices(system.WatchDevicesRequest(), timeout=WAIT_S)
    away = next(text for look in watch for text in look.warnings)
    assert first.address in away and second.address not in away
    first.start()


def test_a_clip_that_fits_one_of_them_is_accepted(gateway, fusions):
    first, second = fusions
    first.system.total_bytes[system.VRAM_MODE_FP8] = 1000
    assert gateway.create(vram_mode=system.VRAM_MODE_FP8).state == pb.JOB_STATE_QUEUED
    assert first.system.plans and second.system.plans


def test_a_mode_is_switched_on_all_of_them(gateway, fusions):
    wish = system.SetModeRequest(vram_mode=system.VRAM_MODE_FP8, model="720x720_5s")
    assert gateway.system.SetMode(wish, timeout=WAIT_S).plan.fits
    for fusion in fusions:
        assert [(one.vram_mode, one.model) for one in fusion.system.switches] == [(wish.vram_mode, wish.model)]
