"""A real stack, started as a user starts it, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ovi.common.v1 import generation_pb2 as common_pb
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from ovi.vae.v1 import vae_pb2_grpc

REPOSITORY = Path(__file__).resolve().parents[2]
OVI = Path(sys.executable).with_name("ovi")
BUF = Path(sys.executable).with_name("buf")
SERVICES = ("text_encoder", "fusion", "vae", "gateway")
ENDED = (pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
MANY_STEPS = 400
"""A run that is far from its end when a test interrupts it: minutes, where tests wait seconds."""
_RPC_TIMEOUT_S = 60.0


class Program:
    """A child whose output is collected, so that a test can wait for a line of it."""

    def __init__(self, *arguments: str | Path, cwd: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OVI_")}
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=cwd,
            env=environment | {"COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "".join(self._lines)

    def line_with(self, words: str, *, timeout_s: float = 150.0) -> str:
        """The first line that holds `words`, as soon as it is printed."""

        def found() -> str | None:
            return next((line for line in self._lines if words in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout_s)
            line = found()
            assert line is not None, f"{words!r} was not printed within {timeout_s} s:\n" + "".join(self._lines)
            return line

    def wait(self, *, timeout_s: float = 150.0) -> int:
        """The exit status, once all output has been read."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """End it, gently first."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@dataclass
class RunningStack:
    """`ovi up` in its own process, and clients of everything it serves."""

    program: Program
    data_dir: Path
    _channels: dict[str, grpc.Channel] = field(default_factory=dict)

    @property
    def info(self) -> dict[str, Any]:
        """stack.json as it is now."""
        content: dict[str, Any] = json.loads((self.data_dir / "stack.json").read_text())
        return content

    @property
    def address(self) -> str:
        """host:port of the gateway's gRPC API."""
        return str(self.info["grpc_address"])

    def pid(self, service: str) -> int:
        """Process id of a service as it is now."""
        return int(self.info["services"][service]["pid"])

    def channel(self, service: str) -> grpc.Channel:
        """A channel to a service; addresses stay the same over restarts."""
        if service not in self._channels:
            options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]
            self._channels[service] = grpc.insecure_channel(self.info["services"][service]["address"], options=options)
        return self._channels[service]

    @property
    def jobs(self) -> pb_grpc.JobServiceStub:
        return pb_grpc.JobServiceStub(self.channel("gateway"))

    @property
    def models(self) -> pb_grpc.ModelServiceStub:
        return pb_grpc.ModelServiceStub(self.channel("gateway"))

    @property
    def vae(self) -> vae_pb2_grpc.VaeServiceStub:
        return vae_pb2_grpc.VaeServiceStub(self.channel("vae"))

    def num_encoded(self) -> int:
        """Prompts the text encoder's network has run on since its start."""
        stub = text_encoder_pb2_grpc.TextEncoderServiceStub(self.channel("text_encoder"))
        return int(stub.DescribeModel(text_encoder_pb2.DescribeModelRequest(), timeout=_RPC_TIMEOUT_S).num_encoded)

    def fusion_pending(self) -> int:
        """Runs the fusion service has under way or waiting."""
        stub = fusion_pb2_grpc.FusionServiceStub(self.channel("fusion"))
        return int(stub.DescribeModel(fusion_pb2.DescribeModelRequest(), timeout=_RPC_TIMEOUT_S).num_pending)

    def is_serving(self, service: str) -> bool:
        """What a service's health says; waits for a service that is being restarted to answer."""
        stub = health_pb2_grpc.HealthStub(self.channel(service))
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_RPC_TIMEOUT_S, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def create(self, prompt: str, *, request_id: str = "", steps: int = 2, seed: int = 7, **fields: Any) -> pb.Job:
        """Queue a job with a small number of steps."""
        options = common_pb.SamplingOptions(num_inference_steps=steps, seed=seed)
        parameters = pb.GenerationParameters(prompt=prompt, options=options, **fields)
        request = pb.CreateJobRequest(request_id=request_id, parameters=parameters)
        return self.jobs.CreateJob(request, timeout=_RPC_TIMEOUT_S).job

    def watch(self, job_id: str) -> Iterator[pb.Job]:
        """The job's states until it has ended, over restarts of the gateway."""
        while True:
            call = self.jobs.WatchJob(pb.WatchJobRequest(id=job_id), wait_for_ready=True)
            try:
                for answer in call:
                    yield answer.job
                    if answer.job.state in ENDED:
                        return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            finally:
                call.cancel()

    def finished(self, job_id: str) -> pb.Job:
        """The job once it has ended."""
        *_, job = self.watch(job_id)
        return job

    def denoising(self, job_id: str, *, steps: int = 2) -> pb.Job:
        """The job as soon as it has done that many steps."""
        for job in self.watch(job_id):
            assert job.state not in ENDED, job
            if job.progress.stage == pb.JOB_STAGE_DENOISE and job.progress.done >= steps:
                return job
        raise AssertionError(f"the watch of {job_id} ended early")

    def stop(self, number: signal.Signals) -> None:
        """End it by a signal, with work under way; fails unless it ends in order and leaves nothing behind."""
        children = psutil.Process(self.program.process.pid).children(recursive=True)
        assert {self.pid(service) for service in SERVICES} == {child.pid for child in children}
        self.denoising(self.create("cut short", steps=MANY_STEPS).id, steps=1)
        self.program.process.send_signal(number)
        assert self.program.wait() == 0, self.program.output
        assert all_gone(children, timeout_s=1.0)
        assert not (self.data_dir / "stack.json").exists()
        stopped = [line.split()[0] for line in self.program.output.splitlines() if " stopping" in line]
        assert stopped[0] == "gateway" and set(stopped) == set(SERVICES)

    def close(self) -> None:
        """Stop it all."""
        for channel in self._channels.values():
            channel.close()
        self.program.close()


def start_stack(data_dir: Path, *arguments: str | Path) -> RunningStack:
    """`ovi up` on free ports; returns when it says that it is ready."""
    command = (OVI, "up", "--data-dir", data_dir, "--grpc-port", "0", "--http-port", "0", *arguments)
    program = Program(*command, cwd=data_dir.parent)
    try:
        program.line_with("Ready.")
    except AssertionError:
        program.close()
        raise
    return RunningStack(program, data_dir)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """One stack for all tests that leave it as they found it."""
    running = start_stack(tmp_path_factory.mktemp("stack") / "data", "--preset", "tiny")
    with contextlib.closing(running):
        yield running


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts programs in the test's folder and ends them with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str | Path) -> Program:
            started = Program(*arguments, cwd=tmp_path)
            stack.callback(started.close)
            return started

        yield start


@pytest.fixture(scope="session")
def ffprobe() -> Path:
    """The tool that looks at clips: from PATH, or the one `make test` fetches."""
    found = shutil.which("ffprobe") or shutil.which("ffprobe", path=REPOSITORY / ".tools")
    if found is None:
        pytest.fail("ffprobe is needed: install ffmpeg, or run `make ffprobe` (wants npm)", pytrace=False)
    return Path(found)


def all_gone(processes: list[psutil.Process], *, timeout_s: float = 30.0) -> bool:
    """True once none of them runs; a zombie that nobody reaps does not run."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
