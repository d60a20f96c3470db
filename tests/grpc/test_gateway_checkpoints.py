"""Checkpoints of a denoise in the gateway: what is kept, what goes on from it, pause. Driven by events, not by time."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import torch

from ovi.common.v1 import system_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.config import PipelineOptions
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import DenoiseCall, ScriptedStages, checkpoint_of, clip_of, scripted_stages, steps_of

STEPS = 6


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


def at_step(number: int) -> Callable[[pb.Job], bool]:
    return lambda now: now.progress.stage == pb.JOB_STAGE_DENOISE and now.progress.done == number


def kept_file(data_dir: Path, job_id: str) -> Path:
    return data_dir / "artifacts" / job_id / "denoise.safetensors"


def wait_until_kept(stages: ScriptedStages, data_dir: Path, job_id: str, gateway: GatewayUnderTest, steps: int) -> None:
    """The file is renamed into its place by an event that nobody tells; so look, as often as a step is told."""
    path = kept_file(data_dir, job_id)
    call_bound = 2000
    for _ in range(call_bound):
        if path.is_file() and steps_of(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)) == steps:
            return
        gateway.get(job_id)
    raise AssertionError(f"no checkpoint of step {steps} was kept")


def begin(
    gateway: GatewayUnderTest, stages: ScriptedStages, data_dir: Path, **parameters
) -> tuple[pb.Job, DenoiseCall]:
    """A job that was kept after its second step, and has finished its third."""
    job = gateway.create(steps=STEPS, **parameters)
    call = stages.fusion.next_call()
    assert "checkpoint" not in call.inputs and call.request.run_id == job.id
    call.step()
    call.step()
    call.keep(stages.fusion.checkpoint(2))
    call.step()
    gateway.until(job.id, at_step(3))
    wait_until_kept(stages, data_dir, job.id, gateway, 2)
    return job, call


def rest_of(gateway: GatewayUnderTest, job: pb.Job, call: DenoiseCall) -> list[pb.Job]:
    """All states of a job while a call makes all that is left of it."""
    watch = gateway.watch(job.id)
    seen = [next(watch)]
    call.finish()
    return [*seen, *watch]


def metric(gateway: GatewayUnderTest, name: str) -> float:
    lines = httpx.get(f"{gateway.http_url}/metrics", timeout=WAIT_S).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_every_how_many_steps_is_a_flag(stages, data_dir):
    with running_gateway(data_dir, *stages.flags, "--checkpoint-steps", "3") as gateway:
        gateway.create()
        assert stages.fusion.next_call().request.checkpoint_steps == 3
    assert PipelineOptions(1, 1, 1).checkpoint_steps == 10
    with pytest.raises(ValueError, match="--checkpoint-steps"):
        PipelineOptions(1, 1, 1, checkpoint_steps=-1)


def test_a_killed_worker_costs_the_steps_since_the_checkpoint(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, _ = begin(gateway, stages, data_dir, seed=31)
        stages.fusion.stop()
        stages.fusion.start()
        call = stages.fusion.next_call()
        assert torch.equal(call.inputs["checkpoint"], checkpoint_of(2))
        seen = rest_of(gateway, job, call)
        end = seen[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2 and gateway.download(job.id) == clip_of(31)
        denoising = [now.progress.done for now in seen if now.progress.stage == pb.JOB_STAGE_DENOISE]
        assert denoising[0] == 2 and denoising == sorted(denoising), "its progress begins at the checkpoint's step"
        assert len(end.setbacks) == 1 and "fusion" in end.setbacks[0].reason
        assert metric(gateway, "ovi_denoise_steps_repeated_total") == 1
        assert not kept_file(data_dir, job.id).exists(), "a finished denoise needs none"
        assert len(stages.text_encoder.requests) == 1


def test_a_killed_gateway_goes_on_from_the_checkpoint(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir, seed=32)
        gateway.service.process.kill()
        gateway.service.process.wait(WAIT_S)
    assert call.ended.wait(WAIT_S)
    with running_gateway(data_dir, *stages.flags) as gateway:
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 2
        gateway.until(job.id, at_step(2))
        end = rest_of(gateway, job, call)[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2 and gateway.download(job.id) == clip_of(32)


class Released:
    """When a worker gets a checkpoint back."""

    def __init__(self, look: Callable[[], bool]) -> None:
        """
        Args:
            look: called at the release.
        """
        self._look = look
        self.seen: queue.Queue[bool] = queue.Queue()

    def __call__(self) -> None:
        self.seen.put(self._look())


def test_a_checkpoint_is_given_back_when_it_is_kept_and_not_before(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        file = kept_file(data_dir, job.id)
        kept_by_then = Released(lambda: file.read_bytes() == checkpoint_of(3).numpy().tobytes())
        call.keep(stages.fusion.checkpoint(3, kept_by_then))
        assert kept_by_then.seen.get(timeout=WAIT_S)
        # What comes late, from a gateway that was held to be gone, does not take a job back.
        again = Released(lambda: file.read_bytes() == checkpoint_of(3).numpy().tobytes())
        call.keep(stages.fusion.checkpoint(2, again))
        assert again.seen.get(timeout=WAIT_S)


def test_a_checkpoint_that_cannot_be_written_is_given_back_too(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir, seed=38)
        file = kept_file(data_dir, job.id)
        file.unlink()
        (file / "in the way").mkdir(parents=True)
        released = Released(file.is_dir)
        call.keep(stages.fusion.checkpoint(3, released))
        assert released.seen.get(timeout=WAIT_S)
        gateway.service.wait_logged("a checkpoint was not kept", count=1)
        shutil.rmtree(file)
        assert rest_of(gateway, job, call)[-1].state == pb.JOB_STATE_COMPLETED
        assert gateway.download(job.id) == clip_of(38)


def test_what_was_made_in_a_mode_that_was_lowered_is_forgotten(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir, seed=39)
        call.lower(system_pb2.VRAM_MODE_STREAMED, "memory ran out")
        call.step()
        gateway.until(job.id, lambda now: now.attempts == 2 and now.progress.done == 1)
        assert not kept_file(data_dir, job.id).exists()
        released = Released(kept_file(data_dir, job.id).is_file)
        call.keep(stages.fusion.checkpoint(1, released))
        assert released.seen.get(timeout=WAIT_S), "though it has fewer steps"
        assert rest_of(gateway, job, call)[-1].state == pb.JOB_STATE_COMPLETED
        assert metric(gateway, "ovi_denoise_steps_repeated_total") == 3


def test_a_later_checkpoint_takes_the_place_of_the_earlier(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        call.keep(stages.fusion.checkpoint(3))
        wait_until_kept(stages, data_dir, job.id, gateway, 3)
        assert sorted(path.name for path in kept_file(data_dir, job.id).parent.iterdir()) == ["denoise.safetensors"]
        # One that cannot be fetched is no reason to fail, and what was kept stays.
        lost = stages.fusion.checkpoint(4)
        stages.fusion.producer.store.release(lost.state.tensor_id)
        call.keep(lost)
        call.step()
        gateway.until(job.id, at_step(4))
        stages.fusion.stop()
        stages.fusion.start()
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 3
        assert rest_of(gateway, job, call)[-1].state == pb.JOB_STATE_COMPLETED


def test_a_checkpoint_that_the_worker_refuses_is_forgotten(stages, data_dir):
    stages.fusion.refused_checkpoint = "the checkpoint is of a run with another model"
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, _ = begin(gateway, stages, data_dir, seed=33)
        stages.fusion.stop()
        stages.fusion.start()
        call = stages.fusion.next_call()
        assert "checkpoint" in call.inputs
        gateway.until(job.id, lambda now: now.attempts == 3 and now.progress.done == 0)
        assert not kept_file(data_dir, job.id).exists()
        call.step()
        gateway.until(job.id, at_step(1))
        stages.fusion.stop()
        stages.fusion.start()
        call = stages.fusion.next_call()
        assert "checkpoint" not in call.inputs
        end = rest_of(gateway, job, call)[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and gateway.download(job.id) == clip_of(33)
        assert any("another model" in setback.reason for setback in end.setbacks)
        assert metric(gateway, "ovi_denoise_steps_repeated_total") == 1 + 3, "as many as were made"


def test_a_worker_that_dies_again_and_again_is_forgiven_while_something_is_kept(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        for steps_done in (3, 4):
            stages.fusion.stop()
            stages.fusion.start()
            call = stages.fusion.next_call()
            assert steps_of(call.inputs["checkpoint"]) == steps_done - 1
            call.step()
            call.keep(stages.fusion.checkpoint(steps_done))
            wait_until_kept(stages, data_dir, job.id, gateway, steps_done)
        for left in (2, 1, 0):
            stages.fusion.stop()
            assert call.ended.wait(WAIT_S)
            stages.fusion.start()
            if left:
                call = stages.fusion.next_call()
                call.step()  # by which the gateway has seen that the call has begun
                gateway.until(job.id, lambda now, n=6 - left: now.attempts == n and now.progress.done == 5)
        end = gateway.end_of(job.id)
        assert end.state == pb.JOB_STATE_FAILED and "stopped 3 times" in end.error.message
        assert not kept_file(data_dir, job.id).exists()


def test_a_cancelled_job_leaves_no_checkpoint(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        assert gateway.cancel(job.id).state == pb.JOB_STATE_CANCELLED
        assert call.ended.wait(WAIT_S) and not kept_file(data_dir, job.id).parent.exists()


def pause(gateway: GatewayUnderTest, job: pb.Job) -> grpc.Future:
    return gateway.jobs.PauseJob.future(pb.PauseJobRequest(id=job.id), timeout=WAIT_S)


def test_a_paused_denoise_is_kept_where_it_is_and_goes_on(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir, seed=34)
        pausing = pause(gateway, job)
        assert stages.fusion.pauses.get(timeout=WAIT_S) == job.id
        call.step()
        call.keep(stages.fusion.checkpoint(4))
        call.pause()
        assert pausing.result().job.state == pb.JOB_STATE_PAUSED
        assert call.ended.is_set() and kept_file(data_dir, job.id).is_file()
        # The device and the slot are free.
        other = gateway.create(steps=1)
        stages.fusion.next_call().finish()
        assert gateway.end_of(other.id).state == pb.JOB_STATE_COMPLETED
        assert gateway.get(job.id).state == pb.JOB_STATE_PAUSED
        gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=WAIT_S)
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 4
        gateway.until(job.id, at_step(4))
        end = rest_of(gateway, job, call)[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and gateway.download(job.id) == clip_of(34)
        assert metric(gateway, "ovi_denoise_steps_repeated_total") == 0
        assert len(stages.text_encoder.requests) == 2, "nothing was encoded again"


def test_pause_of_a_denoise_that_the_worker_has_not_begun_cuts_it(stages, data_dir):
    stages.fusion.knows_runs = False
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        assert pause(gateway, job).result().job.state == pb.JOB_STATE_PAUSED
        assert call.ended.wait(WAIT_S)
        gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=WAIT_S)
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 2
        assert rest_of(gateway, job, call)[-1].state == pb.JOB_STATE_COMPLETED


def test_pause_while_the_worker_dies_keeps_what_was_kept(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir)
        pausing = pause(gateway, job)
        assert stages.fusion.pauses.get(timeout=WAIT_S) == job.id
        stages.fusion.stop()
        assert pausing.result().job.state == pb.JOB_STATE_PAUSED
        stages.fusion.start()
        gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=WAIT_S)
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 2
        assert rest_of(gateway, job, call)[-1].state == pb.JOB_STATE_COMPLETED


def test_a_paused_job_outlives_its_gateway(stages, data_dir):
    with running_gateway(data_dir, *stages.flags) as gateway:
        job, call = begin(gateway, stages, data_dir, seed=35)
        pausing = pause(gateway, job)
        assert stages.fusion.pauses.get(timeout=WAIT_S) == job.id
        call.keep(stages.fusion.checkpoint(3))
        call.pause()
        pausing.result()
        os.kill(gateway.service.process.pid, 9)
        gateway.service.process.wait(WAIT_S)
    with running_gateway(data_dir, *stages.flags) as gateway:
        assert gateway.get(job.id).state == pb.JOB_STATE_PAUSED
        gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=job.id), timeout=WAIT_S)
        call = stages.fusion.next_call()
        assert steps_of(call.inputs["checkpoint"]) == 3
        end = rest_of(gateway, job, call)[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and gateway.download(job.id) == clip_of(35)


def test_a_job_gives_way_to_one_of_higher_priority_and_goes_on_after_it(stages, data_dir):
    with running_gateway(data_dir, *stages.flags, "--give-way", "--max-concurrent-jobs", "1") as gateway:
        long = gateway.create(steps=20, seed=36, priority=1)
        call = stages.fusion.next_call()
        for _ in range(3):
            call.step()
        gateway.until(long.id, at_step(3))
        urgent = gateway.create(steps=2, seed=37, priority=8)
        assert stages.fusion.pauses.get(timeout=WAIT_S) == long.id
        call.keep(stages.fusion.checkpoint(3))
        call.pause()
        first = stages.fusion.next_call()
        assert first.request.run_id == urgent.id
        assert gateway.get(long.id).state == pb.JOB_STATE_QUEUED
        first.finish()
        assert gateway.end_of(urgent.id).state == pb.JOB_STATE_COMPLETED
        again = stages.fusion.next_call()
        assert again.request.run_id == long.id and steps_of(again.inputs["checkpoint"]) == 3
        end = rest_of(gateway, long, again)[-1]
        assert end.state == pb.JOB_STATE_COMPLETED and gateway.download(long.id) == clip_of(36)
        assert stages.fusion.pauses.empty()


def test_without_the_flag_nobody_gives_way(stages, data_dir):
    with running_gateway(data_dir, *stages.flags, "--max-concurrent-jobs", "1") as gateway:
        long = gateway.create(steps=20, priority=1)
        call = stages.fusion.next_call()
        call.step()
        gateway.until(long.id, at_step(1))
        urgent = gateway.create(steps=2, priority=8)
        call.finish()
        assert gateway.end_of(long.id).state == pb.JOB_STATE_COMPLETED
        stages.fusion.next_call().finish()
        assert gateway.end_of(urgent.id).state == pb.JOB_STATE_COMPLETED and stages.fusion.pauses.empty()
