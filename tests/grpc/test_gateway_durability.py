"""What a job survives: kills of the gateway and of workers, restarts, drains. Driven by step events, not by time."""

from __future__ import annotations

import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.jobs.queue import MAX_OWNERS_LOST
from shared.errors import EXIT_BAD_CONFIG
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import DenoiseCall, ScriptedStages, clip_of, scripted_stages


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


def begin(gateway: GatewayUnderTest, stages: ScriptedStages, **parameters: object) -> tuple[pb.Job, DenoiseCall]:
    """A job that has finished its first step."""
    job = gateway.create(**parameters)
    call = stages.fusion.next_call()
    call.step()
    gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_DENOISE and now.progress.done == 1)
    return job, call


def kill(gateway: GatewayUnderTest) -> None:
    gateway.service.process.kill()
    assert gateway.service.process.wait(WAIT_S) == -signal.SIGKILL


def test_killed_gateway_goes_on_where_it_was(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, seed=41)
        kill(gateway)
    assert call.ended.wait(WAIT_S), "the worker is told that nobody waits any more"
    with running_gateway(data_dir, *stages.flags) as gateway:
        call = stages.fusion.next_call()
        watch = gateway.watch(job.id)
        seen = [next(watch)]
        call.finish()
        seen += watch
        end = seen[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and {state.attempts for state in seen} == {2}
        fractions = [state.progress.fraction for state in seen]
        assert fractions == sorted(fractions), "progress never goes back within an attempt"
        assert gateway.download(job.id) == clip_of(41)
    assert len(stages.text_encoder.requests) == 1, "a finished stage is not repeated"
    assert len(stages.vae.decodes) == 1


def test_killed_while_decoding_does_not_denoise_again(stages, data_dir):
    stages.vae.allowed.clear()
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, seed=42)
        call.finish()
        gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_DECODE and now.progress.done == 60)
        kill(gateway)
    stages.vae.allowed.set()
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
        assert gateway.download(job.id) == clip_of(42)
    assert stages.fusion.calls.empty() and len(stages.vae.decodes) == 2


def test_kept_latents_are_used_though_the_step_was_not_recorded(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, seed=43)
        call.finish()
        gateway.end_of(job.id)
        kept = (data_dir / "artifacts" / job.id / "latents.safetensors").read_bytes()
        other, _ = begin(gateway, stages, seed=43)
        kill(gateway)
    # As if the kill had come between the renaming of the file and the note of the workflow engine.
    folder = data_dir / "artifacts" / other.id
    folder.mkdir()
    (folder / "latents.safetensors").write_bytes(kept)
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.end_of(other.id).state == pb.JOB_STATE_COMPLETED
        assert gateway.download(other.id) == clip_of(43)
    assert stages.fusion.calls.empty()


def test_drain_sends_watchers_away_and_the_job_goes_on_later(stages, data_dir):
    with running_gateway(data_dir, *stages.flags, "--grace-s", "30") as gateway:
        job, call = begin(gateway, stages, seed=44)
        watch = gateway.watch(job.id)
        next(watch)
        gateway.service.process.terminate()
        with pytest.raises(grpc.RpcError) as ended:
            list(watch)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE and "draining" in ended.value.details()
        assert gateway.service.process.wait(20) == 0, "the drain did not wait for the watched job"
    assert call.ended.is_set()
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.get(job.id).state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
        stages.fusion.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED


def test_killed_fusion_begins_the_denoise_again(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, seed=45)
        stages.fusion.stop()
        assert call.ended.wait(WAIT_S)
        gateway.until(job.id, lambda now: now.attempts == 2)
        assert gateway.get(job.id).state == pb.JOB_STATE_RUNNING
        stages.fusion.start()
        stages.fusion.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
        assert gateway.download(job.id) == clip_of(45)
    assert len(stages.text_encoder.requests) == 1


def test_fusion_that_dies_with_every_try_fails_the_job(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages)
        for attempt in range(2, 5):
            stages.fusion.stop()
            assert call.ended.wait(WAIT_S)
            stages.fusion.start()
            if attempt < 4:
                call = stages.fusion.next_call()
                call.step()
                gateway.until(job.id, lambda now, n=attempt: now.attempts == n and now.progress.done == 1)
        end = gateway.end_of(job.id)
        assert end.state == pb.JOB_STATE_FAILED and end.error.code == "UNAVAILABLE"
        assert "stopped 3 times" in end.error.message


def test_vae_that_dies_with_every_try_fails_the_job(stages, data_dir):
    stages.vae.allowed.clear()
    try:
        with running_gateway(data_dir, *stages.flags) as gateway:
            job, call = begin(gateway, stages)
            call.finish()
            for attempt in range(1, 4):
                gateway.until(
                    job.id,
                    lambda now, n=attempt: (
                        now.attempts == n and now.progress.stage == pb.JOB_STAGE_DECODE and now.progress.done == 60
                    ),
                )
                stages.vae.stop()
                stages.vae.start()
            end = gateway.end_of(job.id)
            assert end.state == pb.JOB_STATE_FAILED and end.error.code == "UNAVAILABLE"
            assert "the vae service stopped 3 times" in end.error.message
            assert end.progress.stage == pb.JOB_STAGE_DECODE and stages.fusion.calls.empty(), "nothing was made again"
    finally:
        stages.vae.allowed.set()


def test_killed_encoder_loses_its_references_and_encodes_again(stages, data_dir):
    stages.fusion.stop()
    with running_gateway(data_dir, *stages.flags) as gateway:
        stages.fusion.start()
        job, _ = begin(gateway, stages, seed=46)
        stages.fusion.stop()
        gateway.until(job.id, lambda now: now.attempts == 2)
        stages.text_encoder.producer.lose()
        stages.fusion.start()
        stages.fusion.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    assert len(stages.text_encoder.requests) == 2


def test_absent_worker_is_waited_for_and_the_job_can_be_cancelled(stages, data_dir):
    stages.text_encoder.stop()
    with running_gateway(data_dir, *stages.flags) as gateway:
        cancelled, waiting = gateway.create(seed=1), gateway.create(seed=2)
        for job in (cancelled, waiting):
            gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_ENCODE_PROMPT)
        assert gateway.cancel(cancelled.id).state == pb.JOB_STATE_CANCELLED
        assert gateway.get(waiting.id).state == pb.JOB_STATE_RUNNING
        stages.text_encoder.start()
        call = stages.fusion.next_call()
        assert call.request.options.seed == 2
        call.finish()
        assert gateway.end_of(waiting.id).state == pb.JOB_STATE_COMPLETED


def test_patience_ends(stages, data_dir):
    stages.text_encoder.stop()
    with running_gateway(data_dir, *stages.flags, "--worker-wait-s", "0.5") as gateway:
        end = gateway.end_of(gateway.create().id)
        assert end.state == pb.JOB_STATE_FAILED and end.error.code == "UNAVAILABLE"
        assert "0.5 s" in end.error.message and stages.text_encoder.address in end.error.message


def test_a_stage_has_a_deadline(stages, data_dir):
    with running_gateway(data_dir, *stages.flags, "--stage-timeout-s", "2") as gateway:
        job = gateway.create()
        call = stages.fusion.next_call()
        end = gateway.end_of(job.id)
        assert end.state == pb.JOB_STATE_FAILED and end.error.code == "DEADLINE_EXCEEDED"
        assert call.ended.wait(WAIT_S), "the worker is stopped"


def test_create_without_models_is_unavailable_then_lives_on_what_is_known(stages, data_dir):
    stages.fusion.stop()
    with running_gateway(data_dir, *stages.flags) as gateway:
        with pytest.raises(grpc.RpcError) as refused:
            gateway.create()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE and stages.fusion.address in refused.value.details()
        stages.fusion.start()
        first = gateway.create(seed=1)
        stages.fusion.next_call().finish()
        gateway.end_of(first.id)
        stages.fusion.stop()
        second = gateway.create(seed=2)
        stages.fusion.start()
        stages.fusion.next_call().finish()
        assert gateway.end_of(second.id).state == pb.JOB_STATE_COMPLETED


def test_cancel_is_remembered_over_a_kill(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages)
        gateway.cancel(job.id)
        assert call.ended.wait(WAIT_S)
        kill(gateway)
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.end_of(job.id).state == pb.JOB_STATE_CANCELLED
        after, call = begin(gateway, stages, seed=77)
        assert call.request.options.seed == 77, "the cancelled job was not taken up"
        call.finish()
        assert gateway.end_of(after.id).state == pb.JOB_STATE_COMPLETED


def edit(data_dir: Path, statement: str, *values: object) -> int:
    """Change a gateway's database behind its back; the number of rows changed."""
    connection = sqlite3.connect(data_dir / "ovi.sqlite3")
    with connection:
        changed = connection.execute(statement, values).rowcount
    connection.close()
    return changed


def test_crash_between_row_and_workflow_strands_nothing(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, _ = begin(gateway, stages, seed=51, request_id="stranded")
        kill(gateway)
    edit(data_dir, "DELETE FROM workflow_status WHERE workflow_uuid = ?", job.id)
    edit(data_dir, "UPDATE jobs SET state = 'queued', attempts = 0 WHERE id = ?", job.id)
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.create(seed=51, request_id="stranded").id == job.id
        stages.fusion.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    assert stages.fusion.calls.empty(), "it ran once"


def test_a_job_that_was_taken_and_never_begun_is_begun(stages, data_dir):
    """Its start can fail after it was taken, and so can letting go of it."""
    with running_gateway(data_dir, *stages.flags, "--max-concurrent-jobs", "1") as gateway:
        _, call = begin(gateway, stages)
        waiting = gateway.create(seed=53)
        take = (
            "UPDATE jobs SET state = 'running', owner = (SELECT owner FROM jobs WHERE state = 'running') WHERE id = ?"
        )
        assert edit(data_dir, take, waiting.id) == 1
        call.finish()
        stages.fusion.next_call().finish()
        end = gateway.end_of(waiting.id)
        assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1
        assert gateway.download(waiting.id) == clip_of(53)
    assert stages.fusion.calls.empty(), "it ran once"


@pytest.mark.parametrize(
    ("status", "state", "said"),
    [
        ("ERROR", pb.JOB_STATE_FAILED, "ERROR"),
        ("SUCCESS", pb.JOB_STATE_FAILED, "SUCCESS"),
        ("CANCELLED", pb.JOB_STATE_CANCELLED, ""),
    ],
)
def test_workflow_that_ended_alone_ends_its_job(stages, data_dir, status, state, said):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, _ = begin(gateway, stages)
        kill(gateway)
    edit(data_dir, "UPDATE workflow_status SET status = ? WHERE workflow_uuid = ?", status, job.id)
    with running_gateway(data_dir, *stages.flags) as gateway:
        end = gateway.end_of(job.id)
        assert end.state == state and said in end.error.message


def test_job_of_another_pipeline_version_begins_again(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, _ = begin(gateway, stages, seed=52)
        kill(gateway)
    edit(data_dir, "UPDATE workflow_status SET application_version = '0' WHERE workflow_uuid = ?", job.id)
    with running_gateway(data_dir, *stages.flags) as gateway:
        stages.fusion.next_call().finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED


def test_job_that_takes_the_gateway_with_it_is_given_up(stages, data_dir):
    job = None
    for attempt in range(1, MAX_OWNERS_LOST + 2):
        with running_gateway(data_dir, *stages.flags) as gateway:
            job = job or gateway.create()
            call = stages.fusion.next_call()
            assert gateway.get(job.id).attempts == attempt
            kill(gateway)
        assert call.ended.wait(WAIT_S)
    with running_gateway(data_dir, *stages.flags) as gateway:
        end = gateway.end_of(job.id)
        assert end.state == pb.JOB_STATE_FAILED and end.error.code == "ABORTED" and "4 times" in end.error.message
    assert stages.fusion.calls.empty()


def test_second_gateway_on_the_same_data_is_refused(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as first:
        with running_gateway(data_dir, *stages.flags, serving=False) as second:
            assert second.service.process.wait(WAIT_S) == EXIT_BAD_CONFIG
            said = str(second.service.log[-1])
            assert str(data_dir) in said and str(first.service.process.pid) in said
        job, call = begin(first, stages)
        call.finish()
        assert first.end_of(job.id).state == pb.JOB_STATE_COMPLETED


def test_what_keeps_a_gateway_from_starting_is_said(stages, data_dir):
    data_dir.mkdir()
    (data_dir / "ovi.sqlite3").write_bytes(b"no database" * 1000)
    with running_gateway(data_dir, *stages.flags, serving=False) as gateway:
        assert gateway.service.process.wait(WAIT_S) == EXIT_BAD_CONFIG
    assert "ovi.sqlite3 cannot be used" in str(gateway.service.log[-1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running_gateway(data_dir, "--http-port", port, serving=False) as gateway:
            assert gateway.service.process.wait(WAIT_S) == EXIT_BAD_CONFIG
    assert f"--http-port {port}" in str(gateway.service.log[-1])
    (data_dir / "ovi.sqlite3").unlink()
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages)
        call.finish()
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
