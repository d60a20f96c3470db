"""Talking to a gateway: calls with errors in words, and a watch that survives the gateway's restarts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import typer

from cli.connection import Connection, chosen_connection
from cli.errors import EXIT_INTERRUPTED
from cli.interrupt import Interrupted, run_interruptible
from ovi.common.v1 import system_pb2, system_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from shared.errors import CorruptTensor, OviError, Unavailable
from shared.grpc_client import error_of

T = TypeVar("T")

UPLOAD_CHUNK_BYTES = 1 << 20
ENDED = frozenset({pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})
_BATCH_TIMEOUT_S = 120.0
_CALL_TIMEOUT_S = 30.0
_PATIENCE_S = 60.0
"""How long a gateway that has answered once may be away before a watch gives up."""
_RETRY_S = 0.5


class GatewayClient:
    """One gateway's services. Use inside `async with`."""

    def __init__(self, server: str, connection: Connection | None = None) -> None:
        """
        Args:
            server: host:port.
            connection: how to reach it; None: as the flags say.

        Raises:
            UsageProblem: the API key would travel readable.
        """
        self._server = server
        connection = connection or chosen_connection()
        self._metadata = connection.metadata
        self._channel = connection.open(server)
        self._jobs = pb_grpc.JobServiceStub(self._channel)
        self._system = system_pb2_grpc.SystemServiceStub(self._channel)

    async def __aenter__(self) -> GatewayClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._channel.close()

    async def create(self, request: pb.CreateJobRequest) -> pb.Job:
        """Queue a job.

        Raises:
            InvalidRequest: wrong fields.
            OviError: any other refusal.
        """
        answer: pb.CreateJobResponse = await self._call(
            self._jobs.CreateJob(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.job

    async def get(self, job_id: str) -> pb.Job:
        """Read a job.

        Raises:
            NotFound: there is none of this id.
        """
        answer: pb.GetJobResponse = await self._call(
            self._jobs.GetJob(pb.GetJobRequest(id=job_id), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.job

    async def list(self, states: Sequence[pb.JobState.ValueType], limit: int) -> list[pb.Job]:
        """The newest `limit` jobs in these states (none: in any), newest first."""
        jobs: list[pb.Job] = []
        token = ""
        while len(jobs) < limit:
            request = pb.ListJobsRequest(page_size=min(limit - len(jobs), 1000), page_token=token, states=states)
            page: pb.ListJobsResponse = await self._call(
                self._jobs.ListJobs(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
            )
            jobs.extend(page.jobs)
            token = page.next_page_token
            if not token:
                break
        return jobs

    async def watch(self, job_id: str) -> AsyncIterator[pb.Job]:
        """The job now, then after every change, until it has ended. Connects again when the gateway restarts.

        Raises:
            NotFound: there is none of this id.
            Unavailable: the gateway stayed away for a minute, or never answered.
        """
        last_s: float | None = None
        while True:
            try:
                async for answer in self._jobs.WatchJob(pb.WatchJobRequest(id=job_id), metadata=self._metadata):
                    last_s = time.monotonic()
                    yield answer.job
                    if answer.job.state in ENDED:
                        return
            except grpc.aio.AioRpcError as error:
                away = error.code() is grpc.StatusCode.UNAVAILABLE
                if not away or last_s is None or time.monotonic() - last_s > _PATIENCE_S:
                    raise self._in_words(error) from None
            await asyncio.sleep(_RETRY_S)

    async def workers(self) -> Sequence[system_pb2.Worker]:
        """The workers of the stages, as the gateway sees them."""
        answer: system_pb2.ListWorkersResponse = await self._call(
            self._system.ListWorkers(system_pb2.ListWorkersRequest(), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.workers

    async def cancel(self, job_id: str) -> pb.Job:
        """Ask a job to stop.

        Raises:
            NotFound: there is none of this id.
        """
        answer: pb.CancelJobResponse = await self._call(
            self._jobs.CancelJob(pb.CancelJobRequest(id=job_id), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.job

    async def pause(self, job_id: str) -> pb.Job:
        """Set a job aside.

        Raises:
            NotFound: there is none of this id.
            FailedPrecondition: it has ended.
        """
        # A running job answers when what it has made is kept.
        answer: pb.PauseJobResponse = await self._call(
            self._jobs.PauseJob(pb.PauseJobRequest(id=job_id), metadata=self._metadata)
        )
        return answer.job

    async def resume(self, job_id: str) -> pb.Job:
        """Put a paused job back into the queue.

        Raises:
            NotFound: there is none of this id.
            FailedPrecondition: it is not paused.
        """
        answer: pb.ResumeJobResponse = await self._call(
            self._jobs.ResumeJob(pb.ResumeJobRequest(id=job_id), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.job

    async def create_batch(self, request: pb.BatchCreateRequest) -> pb.BatchCreateResponse:
        """Make many jobs, all or none.

        Raises:
            InvalidRequest: with what is wrong, row by row.
        """
        answer: pb.BatchCreateResponse = await self._call(
            self._jobs.BatchCreate(request, timeout=_BATCH_TIMEOUT_S, metadata=self._metadata)
        )
        return answer

    async def delete(self, job_id: str) -> None:
        """Delete an ended job and its files.

        Raises:
            NotFound: there is none of this id.
            FailedPrecondition: it has not ended.
        """
        await self._call(
            self._jobs.DeleteJob(pb.DeleteJobRequest(id=job_id), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    async def upload_image(self, picture: bytes) -> str:
        """Send a first picture; its id.

        Raises:
            InvalidRequest: not a picture, or too large.
        """

        def parts() -> Iterator[pb.UploadImageRequest]:
            for start in range(0, len(picture), UPLOAD_CHUNK_BYTES):
                yield pb.UploadImageRequest(chunk=picture[start : start + UPLOAD_CHUNK_BYTES])

        answer: pb.UploadImageResponse = await self._call(
            self._jobs.UploadImage(parts(), timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )
        return answer.image_id

    async def download(self, job: pb.Job, out: Path) -> None:
        """Write a completed job's mp4; `out` appears only when every byte is there.

        Raises:
            NotFound: the job has no video.
            CorruptTensor: fewer or more bytes came than the job says.
            OSError: `out` cannot be written.
        """
        temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                async for part in self._jobs.DownloadVideo(pb.DownloadVideoRequest(id=job.id), metadata=self._metadata):
                    file.write(part.chunk)
                received = file.tell()
            if received != job.video.num_bytes:
                raise CorruptTensor(f"{received} of {job.video.num_bytes} bytes of the video came; download it again")
            temporary.replace(out)
        except grpc.aio.AioRpcError as error:
            raise self._in_words(error) from None
        finally:
            temporary.unlink(missing_ok=True)

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._in_words(error) from None

    def _in_words(self, error: grpc.aio.AioRpcError) -> OviError:
        known = error_of(error)
        if isinstance(known, Unavailable):
            return Unavailable(
                f"the gateway at {self._server} cannot be used now ({known.message});"
                " `ovi up` starts one, `ovi doctor` tells what is wrong"
            )
        return known


def run_with_client(server: str, work: Callable[[GatewayClient], Awaitable[T]]) -> T:
    """The result of some work with a gateway; Ctrl-C ends the command.

    Raises:
        OviError: what the work raises.
        typer.Exit: it was interrupted.
    """

    async def run() -> T:
        async with GatewayClient(server) as client:
            return await work(client)

    coroutine: Coroutine[Any, Any, T] = run()
    try:
        return run_interruptible(coroutine)
    except Interrupted:
        raise typer.Exit(EXIT_INTERRUPTED) from None
