"""Workers that come, go and register: what the gateway knows of them, and whom it gives jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from cli.main import app
from ovi.common.v1 import system_pb2 as system
from ovi.common.v1 import system_pb2_grpc as system_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from shared.places import Place
from shared.registration import Announcer, Registration
from shared.tls import Tls
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway, violations_of
from tests.grpc.scripted_stages import MODEL, DenoiseCall, ScriptedFusion, ScriptedStages, clip_of, scripted_stages
from tests.service_process import running_service

ADMIN_KEY = "an-administrators-key-from-a-file-0123456789"


def listed(gateway: GatewayUnderTest, stage: str = "fusion") -> dict[str, system.Worker]:
    answer = gateway.system.ListWorkers(system.ListWorkersRequest(), timeout=WAIT_S)
    return {worker.address: worker for worker in answer.workers if worker.stage == stage}


def until(
    gateway: GatewayUnderTest, reached: Callable[[dict[str, system.Worker]], bool], stage: str = "fusion"
) -> dict[str, system.Worker]:
    """The workers of a stage as soon as they are as wished; nobody tells of them unasked."""
    deadline_s = time.monotonic() + WAIT_S
    while not reached(found := listed(gateway, stage)):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


def serving(*addresses: str) -> Callable[[dict[str, system.Worker]], bool]:
    """That these, and no others, are there and serve."""
    return lambda found: (
        set(found) == set(addresses) and all(one.state == system.WORKER_STATE_SERVING for one in found.values())
    )


@contextlib.contextmanager
def announced(stage: str, port: int, registration: Registration) -> Iterator[Callable[[], None]]:
    """A worker's registration as its process makes it, in a thread; what is given lets it end before."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(Announcer(stage, "127.0.0.1", registration).run(port))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
            thread.join(WAIT_S)
        assert not thread.is_alive()

    try:
        yield end
    finally:
        end()


def next_call_of(fusions: list[ScriptedFusion]) -> tuple[ScriptedFusion, DenoiseCall]:
    """The next call of any of them, when it comes."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        for fusion in fusions:
            with contextlib.suppress(queue.Empty):
                return fusion, fusion.calls.get(timeout=0.05)
    raise AssertionError("no call came")


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@pytest.fixture
def other() -> Iterator[ScriptedFusion]:
    other = ScriptedFusion()
    other.automatic = False
    yield other
    other.close()


def both(stages: ScriptedStages, other: ScriptedFusion) -> list[str]:
    return [*stages.flags, "--fusion", f"{stages.fusion.address},{other.address}"]


def test_an_operator_sees_the_workers(stages, other, tmp_path) -> None:
    told = other.system.worker
    told.loaded_model, told.loaded_vram_mode, told.allocation = MODEL, system.VRAM_MODE_FP8, "single"
    told.free_bytes, told.total_bytes, told.num_pending = 60_000_000_000, 80_000_000_000, 3
    told.num_cut, told.cut_s = 2, 1.5
    with running_gateway(tmp_path / "data", *both(stages, other)) as gateway:
        job = gateway.create(seed=1)
        call = stages.fusion.next_call()
        found = until(gateway, serving(stages.fusion.address, other.address))
        assert list(found[stages.fusion.address].job_ids) == [job.id]
        worker = found[other.address]
        assert (worker.source, worker.reason) == (system.WORKER_SOURCE_ADDRESS, "")
        assert (worker.loaded_model, worker.num_pending, worker.free_bytes) == (MODEL, 3, 60_000_000_000)
        until(gateway, lambda found: len(found) == 1, "vae")

        args = ["workers", "--server", gateway.service.address]
        shown = CliRunner().invoke(app, [*args, "--stage", "fusion"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        (line,) = [line for line in shown.stdout.splitlines() if other.address in line]
        assert "serving" in line and f"{MODEL}, fp8" in line and "60.0 GB of 80.0 GB" in line
        lines = [json.loads(line) for line in CliRunner().invoke(app, [*args, "--json"]).stdout.splitlines()]
        assert {line["stage"] for line in lines} == {"text_encoder", "fusion", "vae"}

        other.stop()
        found = until(gateway, lambda found: found[other.address].state == system.WORKER_STATE_UNREACHABLE)
        assert "cannot be reached" in found[other.address].reason
        metrics = httpx.get(f"{gateway.http_url}/metrics", timeout=WAIT_S).text
        assert 'ovi_workers{stage="fusion",state="serving"} 1.0' in metrics
        assert 'ovi_workers{stage="fusion",state="unreachable"} 1.0' in metrics
        assert f'ovi_worker_pending{{address="{stages.fusion.address}",stage="fusion"}} 1.0' in metrics
        cancels = f'ovi_cancel_latency_seconds_{{}}{{{{address="{other.address}",stage="fusion"}}}}'
        assert f"{cancels.format('count')} 2.0" in metrics and f"{cancels.format('sum')} 1.5" in metrics
        call.finish()
        gateway.end_of(job.id)


def test_a_job_goes_where_least_waits_and_its_variant_is_loaded(stages, other, tmp_path) -> None:
    first = stages.fusion
    for fusion, model in ((first, "960x960_10s"), (other, MODEL)):
        fusion.system.worker.loaded_model, fusion.system.worker.models[:] = model, [MODEL, "960x960_10s"]
    with running_gateway(tmp_path / "data", *both(stages, other)) as gateway:
        until(gateway, serving(first.address, other.address))
        for seed in (1, 2):
            job = gateway.create(seed=seed)
            other.next_call().finish()
            assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED, "twice: it has loaded the variant"
        other.system.worker.num_pending = 2
        until(gateway, lambda found: found[other.address].num_pending == 2)
        job = gateway.create(seed=3)
        first.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED, "jobs of other gateways wait at the other one"
        first.system.worker.models[:] = ["960x960_10s"]
        until(gateway, lambda found: list(found[first.address].models) == ["960x960_10s"])
        job = gateway.create(seed=4)
        other.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED, "the first has the variant no more"


def test_a_worker_that_drains_ends_its_job_and_gets_no_other(stages, other, tmp_path) -> None:
    with running_gateway(tmp_path / "data", *both(stages, other)) as gateway:
        job = gateway.create(seed=1)
        call = stages.fusion.next_call()
        stages.fusion.system.draining = True
        found = until(gateway, lambda found: found[stages.fusion.address].state == system.WORKER_STATE_NOT_SERVING)
        assert "draining" in found[stages.fusion.address].reason
        later = [gateway.create(seed=seed) for seed in (2, 3)]
        for _ in later:
            other.next_call().finish()
        call.finish()
        for each in (job, *later):
            end = gateway.end_of(each.id)
            assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1


def test_a_job_that_kills_three_different_workers_is_parked(stages, other, tmp_path) -> None:
    third = ScriptedFusion()
    third.automatic = False
    fusions = [stages.fusion, other, third]
    addresses = ",".join(fusion.address for fusion in fusions)
    with contextlib.closing(third), running_gateway(tmp_path / "data", *stages.flags, "--fusion", addresses) as gateway:
        job = gateway.create(seed=1)
        killed: list[ScriptedFusion] = []
        for number in (1, 2, 3):
            fusion, call = next_call_of(fusions)
            assert fusion not in killed
            call.step()
            gateway.until(job.id, lambda now, number=number: now.attempts == number and now.progress.done == 1)
            fusion.stop()
            killed.append(fusion)
        end = gateway.end_of(job.id)
        for fusion in fusions:
            fusion.start()
    assert end.state == pb.JOB_STATE_FAILED and "the fusion service stopped 3 times" in end.error.message
    kept = [(setback.stage, setback.worker) for setback in end.setbacks]
    assert kept == [(pb.JOB_STAGE_DENOISE, fusion.address) for fusion in killed[:2]], "the third is in the error"


def test_workers_behind_a_name_come_and_go(stages, tmp_path, monkeypatch) -> None:
    names = tmp_path / "names"
    names.mkdir()
    monkeypatch.setenv("OVI_TEST_NAMES", str(names))
    first = stages.fusion
    second = type("Second", (ScriptedFusion,), {"host": "127.0.0.2", "first_port": first.port})()
    second.automatic = False

    def tell(*hosts: str) -> None:
        (names / "new").write_text(" ".join(hosts))
        (names / "new").rename(names / "fusion.test")

    tell("127.0.0.1")
    flags = [*stages.flags, "--fusion", f"dns:///fusion.test:{first.port}"]
    module = "tests.grpc.named_gateway"
    with contextlib.closing(second), running_gateway(tmp_path / "data", *flags, module=module) as gateway:
        found = until(gateway, serving(first.address))
        assert found[first.address].source == system.WORKER_SOURCE_NAME
        jobs = [gateway.create(seed=1)]
        call = first.next_call()
        tell("127.0.0.1", "127.0.0.2")
        until(gateway, serving(first.address, second.address))
        jobs.append(gateway.create(seed=2))
        second.next_call().finish()
        tell("127.0.0.2")
        until(gateway, serving(second.address))
        jobs.append(gateway.create(seed=3))
        second.next_call().finish()
        call.finish()
        for seed, job in enumerate(jobs, 1):
            end = gateway.end_of(job.id)
            assert (
                end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1 and gateway.download(job.id) == clip_of(seed)
            )
        tell()
        until(gateway, lambda found: not found)
        job = gateway.create(seed=4)
        tell("127.0.0.1")
        first.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED


def test_jobs_wait_in_the_queue_until_a_worker_registers(stages, tmp_path) -> None:
    stages.fusion.automatic = True
    with running_gateway(tmp_path / "data", *stages.flags, "--fusion", "registered") as gateway:
        registration = Registration((Place(gateway.service.address),), Tls())
        assert httpx.get(f"{gateway.http_url}/readyz", timeout=WAIT_S).json()["services"]["fusion"] == "UNREACHABLE"
        with pytest.raises(grpc.RpcError) as refused:
            gateway.create(seed=1)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no fusion service is known" in refused.value.details()
        with announced("fusion", stages.fusion.port, registration) as end:
            found = until(gateway, serving(stages.fusion.address))
            assert found[stages.fusion.address].source == system.WORKER_SOURCE_REGISTERED
            assert gateway.end_of(gateway.create(seed=1).id).state == pb.JOB_STATE_COMPLETED
            end()
            assert not listed(gateway), "it took its registration back"
            job = gateway.create(seed=2)
            assert gateway.get(job.id).state == pb.JOB_STATE_QUEUED
            assert stages.text_encoder.requests[-1].prompts[0] == "a lighthouse"
            num_encoded = len(stages.text_encoder.requests)
        with announced("fusion", stages.fusion.port, registration):
            assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
        assert len(stages.text_encoder.requests) == num_encoded + 1, "nothing of it was begun before"


def test_registering_takes_a_key_for_it_and_a_host_that_was_named(stages, tmp_path) -> None:
    data_dir, admin = tmp_path / "data", tmp_path / "admin"
    admin.write_text(ADMIN_KEY)
    runner = CliRunner()
    keys = {
        role: runner.invoke(app, ["keys", "create", role, "--role", role, "--data-dir", str(data_dir)]).stdout.strip()
        for role in ("worker", "user")
    }
    flags = ["--fusion", "registered", "--auth", "required", "--admin-key-file", str(admin)]
    with running_gateway(data_dir, *stages.flags, *flags) as gateway:
        stub = pb_grpc.WorkerServiceStub(gateway.channel)

        def register(
            key: str, address: str = stages.fusion.address, stage: str = "fusion"
        ) -> pb.RegisterWorkerResponse:
            metadata = [("x-api-key", key)] if key else []
            request = pb.RegisterWorkerRequest(stage=stage, address=address)
            return stub.RegisterWorker(request, metadata=metadata, timeout=WAIT_S)

        for key, code in (("", "UNAUTHENTICATED"), (keys["user"], "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as refused:
                register(key)
            assert refused.value.code().name == code
        with pytest.raises(grpc.RpcError) as refused:
            register(keys["worker"], "metadata.internal:80")
        assert "--producer-hosts" in violations_of(refused.value)["address"]
        with pytest.raises(grpc.RpcError) as refused:
            register(keys["worker"], stages.vae.address, "vae")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError) as refused:
            gateway.jobs.ListJobs(pb.ListJobsRequest(), metadata=[("x-api-key", keys["worker"])], timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED, "the key is good for nothing else"

        key_file = tmp_path / "key"
        key_file.write_text(keys["worker"])
        registration = Registration((Place(gateway.service.address),), Tls(), key_file)
        listing = system_grpc.SystemServiceStub(gateway.channel)
        with announced("fusion", stages.fusion.port, registration):
            deadline_s = time.monotonic() + WAIT_S
            found: list[str] = []
            while not found:
                assert time.monotonic() < deadline_s
                answer = listing.ListWorkers(
                    system.ListWorkersRequest(), metadata=[("x-api-key", ADMIN_KEY)], timeout=WAIT_S
                )
                found = [worker.address for worker in answer.workers if worker.stage == "fusion"]
            assert found == [stages.fusion.address]


def test_a_real_service_registers_itself_and_says_goodbye(stages, tiny_checkpoint: Path, tmp_path) -> None:
    stages.fusion.automatic = True
    with running_gateway(tmp_path / "data", *stages.flags, "--text-encoder", "registered") as gateway:
        flags = ["--checkpoints", str(tiny_checkpoint), "--device", "cpu", "--gateway", gateway.service.address]
        with running_service("text_encoder", *flags) as encoder:
            found = until(gateway, serving(encoder.address), "text_encoder")
            worker = found[encoder.address]
            assert worker.total_bytes > worker.free_bytes > 0 and worker.allocation == "single"
            assert gateway.end_of(gateway.create(seed=1).id).state == pb.JOB_STATE_COMPLETED
            assert not stages.text_encoder.requests
            encoder.process.terminate()
            assert encoder.process.wait(WAIT_S) == 0
            assert not listed(gateway, "text_encoder"), "before it ended, and long before its lease does"
            assert not any(entry.get("level") in ("error", "warning") for entry in encoder.log), encoder.log
