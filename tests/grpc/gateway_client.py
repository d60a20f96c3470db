"""A gateway process and the calls that tests make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ovi.common.v1 import generation_pb2, system_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from tests.service_process import ServiceProcess, running_service

WAIT_S = 60.0
ENDED = (pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


class GatewayUnderTest:
    """A running gateway; every call is bounded in time."""

    def __init__(self, service: ServiceProcess, data_dir: Path) -> None:
        self.service = service
        self.data_dir = data_dir
        self.channel = service.channel()
        self.jobs = pb_grpc.JobServiceStub(self.channel)
        self.models = pb_grpc.ModelServiceStub(self.channel)
        self.system = system_pb2_grpc.SystemServiceStub(self.channel)

    @property
    def http_url(self) -> str:
        listening = next(entry for entry in self.service.log if entry["event"] == "http listening")
        scheme = "https" if listening["tls"] else "http"
        return f"{scheme}://{listening['address']}"

    def create(
        self,
        *,
        request_id: str = "",
        steps: int = 4,
        seed: int = 7,
        step_cache_threshold: float | None = None,
        priority: int | None = None,
        **parameters: object,
    ) -> pb.Job:
        """Create a job of a few steps."""
        wanted = pb.GenerationParameters(
            prompt=parameters.pop("prompt", "a lighthouse"),
            options=generation_pb2.SamplingOptions(
                num_inference_steps=steps, seed=seed, step_cache_threshold=step_cache_threshold
            ),
            **parameters,
        )
        request = pb.CreateJobRequest(request_id=request_id, parameters=wanted, priority=priority)
        return self.jobs.CreateJob(request, timeout=WAIT_S).job

    def get(self, job_id: str) -> pb.Job:
        return self.jobs.GetJob(pb.GetJobRequest(id=job_id), timeout=WAIT_S).job

    def watch(self, job_id: str) -> Iterator[pb.Job]:
        for answer in self.jobs.WatchJob(pb.WatchJobRequest(id=job_id), timeout=WAIT_S):
            yield answer.job

    def until(self, job_id: str, reached: Callable[[pb.Job], bool]) -> pb.Job:
        """The first state of the job that is as wished; fails if the job ends before."""
        seen = []
        for job in self.watch(job_id):
            seen.append(job)
            if reached(job):
                return job
        raise AssertionError(f"{job_id} ended otherwise: {seen[-1]}")

    def end_of(self, job_id: str) -> pb.Job:
        """The job's last state, which must be terminal."""
        job = list(self.watch(job_id))[-1]
        assert job.state in ENDED
        return job

    def cancel(self, job_id: str) -> pb.Job:
        return self.jobs.CancelJob(pb.CancelJobRequest(id=job_id), timeout=WAIT_S).job

    def delete(self, job_id: str) -> None:
        self.jobs.DeleteJob(pb.DeleteJobRequest(id=job_id), timeout=WAIT_S)

    def download(self, job_id: str) -> bytes:
        parts = list(self.jobs.DownloadVideo(pb.DownloadVideoRequest(id=job_id), timeout=WAIT_S))
        assert all(len(part.chunk) < 1 << 20 for part in parts)
        return b"".join(part.chunk for part in parts)

    def upload(self, picture: bytes, chunk_bytes: int = 1 << 19) -> pb.UploadImageResponse:
        parts = (picture[start : start + chunk_bytes] for start in range(0, len(picture), chunk_bytes))
        return self.jobs.UploadImage((pb.UploadImageRequest(chunk=part) for part in parts), timeout=WAIT_S)


@contextlib.contextmanager
def running_gateway(
    data_dir: Path,
    *flags: str,
    serving: bool = True,
    credentials: grpc.ChannelCredentials | None = None,
    module: str = "",
) -> Iterator[GatewayUnderTest]:
    """A gateway process on free ports; with credentials, one that has TLS; with a module, that instead of its own."""
    arguments = ["--data-dir", str(data_dir), "--http-port", "0", "--grace-s", "5", *flags]
    given = {"serving": serving, "credentials": credentials, "module": module}
    with running_service("gateway", *arguments, **given) as service:
        gateway = GatewayUnderTest(service, data_dir)
        with gateway.channel:
            yield gateway


def violations_of(error: grpc.RpcError) -> dict[str, str]:
    """Field -> description of an INVALID_ARGUMENT."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(error).details:
        if detail.Unpack(bad):
            return {violation.field: violation.description for violation in bad.field_violations}
    raise AssertionError(f"no field violations in {error}")
