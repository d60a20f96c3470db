"""Cancelling, killing, stopping: a job ends exactly once, and no process is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.e2e.conftest import MANY_STEPS, OVI, SERVICES, Program, RunningStack, all_gone, start_stack


def fusion_becomes_idle(stack: RunningStack) -> bool:
    """True as soon as fusion has no run; False if that takes as long as only an uncancelled run would."""
    deadline_s = time.monotonic() + 30
    while stack.fusion_pending():
        if time.monotonic() > deadline_s:
            return False
    return True


def test_a_cancelled_job_stops_within_a_step(stack: RunningStack) -> None:
    job = stack.create("to be cancelled", steps=MANY_STEPS)
    seen = stack.denoising(job.id)
    stack.jobs.CancelJob(pb.CancelJobRequest(id=job.id), timeout=30)
    end = stack.finished(job.id)
    assert end.state == pb.JOB_STATE_CANCELLED
    assert not end.HasField("video") and not end.HasField("error")
    # One step was under way, and one may have ended between the event and the call.
    assert end.progress.done <= seen.progress.done + 2
    assert fusion_becomes_idle(stack)
    assert stack.finished(stack.create("after it").id).state == pb.JOB_STATE_COMPLETED


def test_a_waiting_job_is_cancelled_without_having_begun(stack: RunningStack) -> None:
    first = stack.create("in front", steps=MANY_STEPS)
    stack.denoising(first.id)
    second = stack.create("behind", steps=MANY_STEPS)
    stack.jobs.CancelJob(pb.CancelJobRequest(id=second.id), timeout=30)
    end = stack.finished(second.id)
    assert end.state == pb.JOB_STATE_CANCELLED
    assert "denoise" not in end.stage_seconds
    stack.jobs.CancelJob(pb.CancelJobRequest(id=first.id), timeout=30)
    assert stack.finished(first.id).state == pb.JOB_STATE_CANCELLED
    assert fusion_becomes_idle(stack)


def test_ctrl_c_cancels_the_job(stack: RunningStack, program: Callable[..., Program], tmp_path: Path) -> None:
    arguments = ("--steps", str(MANY_STEPS), "--server", stack.address)
    command = program(OVI, "generate", "interrupted", *arguments)
    job_id = command.line_with("job ").split()[1]
    stack.denoising(job_id)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.output
    assert stack.finished(job_id).state == pb.JOB_STATE_CANCELLED
    assert list(tmp_path.iterdir()) == []
    assert fusion_becomes_idle(stack)


def test_a_killed_gateway_comes_back_and_finishes_its_job(stack: RunningStack) -> None:
    job = stack.create("a prompt that nobody else uses: gateway", steps=12)
    stack.denoising(job.id)
    encoded, before = stack.num_encoded(), stack.pid("gateway")
    os.kill(before, signal.SIGKILL)
    end = stack.finished(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED, end
    assert end.attempts == 2
    assert stack.pid("gateway") != before
    assert stack.num_encoded() == encoded, "the prompts were encoded before the kill, and not again"
    assert stack.is_serving("gateway")


def test_a_killed_fusion_comes_back_and_the_job_finishes(stack: RunningStack) -> None:
    job = stack.create("a prompt that nobody else uses: fusion", steps=12)
    stack.denoising(job.id)
    before = stack.pid("fusion")
    os.kill(before, signal.SIGKILL)
    end = stack.finished(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED, end
    assert stack.pid("fusion") != before
    assert stack.is_serving("fusion")


def test_a_repeated_request_is_the_same_job(stack: RunningStack) -> None:
    first = stack.create("once only", request_id="order-1")
    second = stack.create("once only", request_id="order-1")
    assert first.id == second.id
    assert stack.finished(first.id).state == pb.JOB_STATE_COMPLETED


def test_ctrl_c_stops_a_stack_and_leaves_no_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    running = start_stack(tmp_path / "data", "--checkpoints", tiny_checkpoint)
    try:
        running.stop(signal.SIGINT)
    finally:
        running.close()


def test_a_killed_supervisor_takes_its_services_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    running = start_stack(tmp_path / "data", "--checkpoints", tiny_checkpoint)
    try:
        children = psutil.Process(running.program.process.pid).children(recursive=True)
        assert len(children) == len(SERVICES)
        running.program.process.kill()
        assert all_gone(children)
    finally:
        running.close()


def test_a_second_stack_on_the_same_folder_or_port_is_refused(
    stack: RunningStack, program: Callable[..., Program], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    same_folder = program(OVI, "up", "--data-dir", stack.data_dir, "--grpc-port", "0", "--http-port", "0")
    assert same_folder.wait() == 2
    assert f"--data-dir: {stack.data_dir} is in use by another stack (gRPC at {stack.address}" in same_folder.output
    port = stack.address.rpartition(":")[2]
    arguments = ("--data-dir", tmp_path / "data", "--checkpoints", tiny_checkpoint, "--grpc-port", port)
    same_port = program(OVI, "up", *arguments)
    assert same_port.wait() == 2
    assert f"--grpc-port: port {port} is taken" in same_port.output
