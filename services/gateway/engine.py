"""What clients can do with jobs; knows no wire. gRPC and HTTP are two faces of this."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterator
from typing import Any, TypeVar

from ovi.gateway.v1 import gateway_pb2
from services.gateway.artifacts import Artifacts
from services.gateway.disk import disk_full_is_said
from services.gateway.fitting import Fitting
from services.gateway.images import ImageInfo, ImageStore
from services.gateway.jobs.domain import Job, JobState, new_job_id
from services.gateway.jobs.store import JobPage
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelCatalog, ModelInfo, runnable
from services.gateway.pipeline import Pipeline
from services.gateway.validation import validate
from shared.errors import FailedPrecondition, InvalidRequest, Unavailable
from shared.memory.modes import VramMode

T = TypeVar("T")

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50


class GatewayEngine:
    """Jobs, pictures and models of one gateway."""

    def __init__(
        self,
        tracker: JobTracker,
        pipeline: Pipeline,
        catalog: ModelCatalog,
        fitting: Fitting,
        artifacts: Artifacts,
        images: ImageStore,
        metrics: GatewayMetrics,
    ) -> None:
        self._tracker = tracker
        self._pipeline = pipeline
        self._catalog = catalog
        self._fitting = fitting
        self._artifacts = artifacts
        self._images = images
        self._metrics = metrics
        self._unbroken: set[asyncio.Task[Any]] = set()

    async def create(self, request_id: str, parameters: gateway_pb2.GenerationParameters) -> Job:
        """Validate and queue a job. The same request_id with the same parameters gives the same job.

        Raises:
            InvalidRequest: with every violation; or, if there is none, because the clip does not fit the device.
            AlreadyExists: the request_id was used with other parameters.
            Unavailable: the models are not known yet.
        """
        asked = hashlib.sha256(parameters.SerializeToString(deterministic=True)).hexdigest()
        if request_id:
            existing = await self._tracker.find_request(request_id, asked)
            if existing is not None:
                return await self._submitted(existing)
        image = await asyncio.to_thread(self._images.find, parameters.image_id)
        wanted = validate(request_id, parameters, await self._catalog.last_known(), image)
        await self._fitting.require(wanted)
        job = Job(id=new_job_id(), parameters=wanted, create_time_s=time.time(), request_id=request_id)
        kept = await self._tracker.create(job, asked)
        if kept.id == job.id:
            self._metrics.job_created()
        return await self._submitted(kept)

    async def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            NotFound: there is none.
        """
        return await self._tracker.get(job_id)

    async def page(self, *, page_size: int, page_token: str, states: Collection[JobState]) -> JobPage:
        """Jobs, newest first; no states means all, page size 0 the default.

        Raises:
            InvalidRequest: page size or token.
        """
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequest.of(
                "page_size", f"got {page_size}, allowed is 1 to {MAX_PAGE_SIZE}, or 0 for the default"
            )
        size = page_size or DEFAULT_PAGE_SIZE
        return await self._tracker.page(page_size=size, page_token=page_token, states=states)

    def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then after every change, until it has ended.

        Raises:
            NotFound: there is none.
            Unavailable: the gateway is draining.
        """
        return self._tracker.watch(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Stop a job; one that has ended stays as it is. Its half-made files go.

        Raises:
            NotFound: there is none.
        """
        await self._tracker.get(job_id)
        await self._to_the_end(self._cancel(job_id))
        return await self._tracker.get(job_id)

    async def delete(self, job_id: str) -> None:
        """Delete an ended job and its files.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it has not ended.
        """
        job = await self._tracker.get(job_id)
        if not job.state.ended:
            raise FailedPrecondition(f"{job_id} is {job.state.value}; cancel it before deleting it")
        await self._to_the_end(self._delete(job_id))

    async def video(self, job_id: str) -> Iterator[bytes]:
        """The finished mp4 in pieces below 1 MiB; reading them blocks.

        Raises:
            NotFound: there is no such job, or its file is gone.
            FailedPrecondition: it is not completed.
        """
        job = await self._tracker.get(job_id)
        if job.state is not JobState.COMPLETED:
            raise FailedPrecondition(f"{job_id} is {job.state.value}; only a completed job has a video")
        return self._artifacts.video_chunks(job_id)

    async def keep_image(self, data: bytes) -> ImageInfo:
        """Keep a first picture.

        Raises:
            InvalidRequest: not a picture, damaged, or too large.
            DiskFull: there is no space to keep it.
        """
        with disk_full_is_said():
            return await asyncio.to_thread(self._images.put, data)

    async def models(self) -> list[ModelInfo]:
        """The variants that can be made, first the default.

        Raises:
            Unavailable: the fusion service is away or loading.
        """
        return list(runnable(await self._catalog.current()).values())

    async def vram_mode(self) -> VramMode:
        """How the fusion service uses device memory at present, as far as it is known; AUTO otherwise."""
        try:
            models = await self._catalog.last_known()
        except Unavailable:
            return VramMode.AUTO
        return next((model.vram_mode for model in models.values()), VramMode.AUTO)

    async def count_by_state(self) -> dict[JobState, int]:
        """Number of jobs in every state."""
        return await self._tracker.count_by_state()

    async def _submitted(self, job: Job) -> Job:
        """Queue a job unless it has ended; a crash may have come between its row and its workflow."""
        if not job.state.ended:
            with disk_full_is_said():
                await self._pipeline.submit(job.id)
        return job

    async def _cancel(self, job_id: str) -> None:
        if await self._pipeline.cancel(job_id):
            await asyncio.to_thread(self._artifacts.delete, job_id)

    async def _delete(self, job_id: str) -> None:
        # The row goes last: whatever a crash leaves behind can be deleted again.
        await self._pipeline.forget(job_id)
        await asyncio.to_thread(self._artifacts.delete, job_id)
        await self._tracker.delete(job_id)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something that must not stop half-way because its caller hung up."""
        task = asyncio.create_task(work)
        self._unbroken.add(task)
        task.add_done_callback(self._unbroken.discard)
        return await asyncio.shield(task)
