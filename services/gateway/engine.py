"""What clients can do with jobs; knows no wire. gRPC and HTTP are two faces of this."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ovi.gateway.v1 import gateway_pb2
from services.gateway.artifacts import VIDEO, Artifacts
from services.gateway.auth.caller import Action, current_caller
from services.gateway.batch import MAX_VIOLATIONS, parameters_of
from services.gateway.disk import disk_full_is_said
from services.gateway.fitting import Fitting
from services.gateway.images import ImageInfo, ImageStore
from services.gateway.jobs.domain import ClipParameters, Job, JobState, Submission, new_batch_id, new_job_id
from services.gateway.jobs.estimates import Estimator, QueueStats
from services.gateway.jobs.listing import JobFilter, JobPage
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelCatalog, ModelInfo, runnable
from services.gateway.pipeline import Pipeline
from services.gateway.validation import control_character, is_request_id, validate
from shared.errors import FailedPrecondition, FieldViolation, InvalidRequest, Unavailable
from shared.logging import get_logger
from shared.memory.modes import VramMode

log = get_logger(__name__)

T = TypeVar("T")

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50


class GatewayEngine:
    """Jobs, pictures and models of one gateway."""

    def __init__(
        self,
        tracker: JobTracker,
        queue: JobQueue,
        pipeline: Pipeline,
        estimator: Estimator,
        catalog: ModelCatalog,
        fitting: Fitting,
        artifacts: Artifacts,
        images: ImageStore,
        metrics: GatewayMetrics,
        *,
        log_prompts: bool = False,
    ) -> None:
        self._log_prompts = log_prompts
        self._tracker = tracker
        self._queue = queue
        self._pipeline = pipeline
        self._estimator = estimator
        self._catalog = catalog
        self._fitting = fitting
        self._artifacts = artifacts
        self._images = images
        self._metrics = metrics
        self._unbroken: set[asyncio.Task[Any]] = set()

    async def create(self, submission: Submission, parameters: gateway_pb2.GenerationParameters) -> Job:
        """Validate and queue a job. The same request_id of the same key with the same parameters gives the same job.

        Raises:
            InvalidRequest: with every violation; or, if there is none, because the clip does not fit the device.
            AlreadyExists: the request_id was used with other parameters.
            QuotaExceeded: the key has made its jobs of the day.
            Unavailable: the models are not known yet.
        """
        submission = _of_caller(submission)
        asked = hashlib.sha256(parameters.SerializeToString(deterministic=True)).hexdigest()
        if is_request_id(submission.request_id):
            existing = await self._tracker.find_request(submission.request_id, asked, submission.key_id)
            if existing is not None:
                return await self._estimated(existing)
        now_s = time.time()
        image = await asyncio.to_thread(self._images.find, parameters.image_id)
        wanted = validate(submission, parameters, await self._catalog.last_known(), image, now_s)
        await self._fitting.require(wanted)
        job = Job(id=new_job_id(), parameters=wanted, create_time_s=now_s, submission=submission)
        kept = await self._tracker.create(job, asked)
        if kept.id == job.id:
            self._note_created(kept)
        self._pipeline.wake()
        return await self._estimated(kept)

    async def create_batch(self, submission: Submission, request: gateway_pb2.BatchCreateRequest) -> list[Job]:
        """Validate and queue many jobs: all, or none. The same request_id of the same key gives the same jobs.

        Raises:
            InvalidRequest: with the violations of all jobs, up to a hundred.
            AlreadyExists: the request_id was used for another batch.
            QuotaExceeded: the key would have more than its jobs of the day.
            Unavailable: the models are not known yet.
        """
        submission = _of_caller(submission)
        asked = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        wishes = await asyncio.to_thread(parameters_of, request)
        numbered = [f"{submission.request_id}.{index}" if submission.request_id else "" for index in range(len(wishes))]
        if is_request_id(numbered[0]):
            first = await self._tracker.find_request(numbered[0], asked, submission.key_id)
            if first is not None:
                return await self._batch(first.submission.batch_id)
        now_s, batch_id = time.time(), new_batch_id()
        wanted = await self._checked(submission, wishes, now_s)
        jobs = [
            Job(
                id=new_job_id(),
                parameters=parameters,
                # Apart by what a double can tell, so that they keep their order.
                create_time_s=now_s + index * 1e-6,
                submission=replace(submission, request_id=request_id, batch_id=batch_id),
            )
            for index, (request_id, parameters) in enumerate(zip(numbered, wanted, strict=True))
        ]
        kept = await self._tracker.create_all(jobs, asked)
        for new in kept if kept[0].id == jobs[0].id else ():
            self._note_created(new)
        self._pipeline.wake()
        return kept

    async def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            NotFound: there is none.
        """
        return await self._estimated(await self._seen(job_id))

    async def page(self, *, page_size: int, page_token: str = "", wanted: JobFilter | None = None) -> JobPage:
        """A page of jobs, newest first unless `wanted` says otherwise; page size 0 is the default.

        Raises:
            InvalidRequest: page size or token.
        """
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequest.of(
                "page_size", f"got {page_size}, allowed is 1 to {MAX_PAGE_SIZE}, or 0 for the default"
            )
        size = page_size or DEFAULT_PAGE_SIZE
        if (key_id := current_caller().key_filter) is not None:
            wanted = replace(wanted or JobFilter(), key_id=key_id)
        for field in ("key_id", "batch_id", "label", "after_id"):
            if wanted is not None and (control := control_character(getattr(wanted, field) or "")) is not None:
                raise InvalidRequest.of(field, f"has the control character {control}, which nothing is named with")
        page = await self._tracker.page(page_size=size, page_token=page_token, wanted=wanted)
        return replace(page, jobs=tuple(await self._estimator.fill(page.jobs)))

    async def stats(self) -> QueueStats:
        """The queue as a whole, as it was at most some seconds ago."""
        return await self._estimator.stats()

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then after every change, until it has ended.

        Raises:
            NotFound: there is none.
            Unavailable: the gateway is draining.
        """
        await self._seen(job_id)
        async with contextlib.aclosing(self._tracker.watch(job_id)) as jobs:
            async for job in jobs:
                yield job

    def watch_all(self) -> AsyncGenerator[Job, None]:
        """Every job, whosoever it is, after each change from now on, until the gateway drains."""
        return self._tracker.watch_all()

    async def cancel(self, job_id: str) -> Job:
        """Stop a job; one that has ended stays as it is. Its half-made files go.

        Raises:
            NotFound: there is none.
        """
        await self._seen(job_id, Action.MAKE)
        await self._to_the_end(self._cancel(job_id))
        return await self.get(job_id)

    async def pause(self, job_id: str) -> Job:
        """Set a job aside: a queued one is not begun, a running one stops and keeps what it has finished.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it has ended.
        """
        await self._seen(job_id, Action.MAKE)
        job = await self._tracker.in_thread(self._queue.pause, job_id)
        if job is None:
            ended = await self._tracker.get(job_id)
            raise FailedPrecondition(f"{job_id} is {ended.state.value}; only a queued or running job can be paused")
        await self._to_the_end(self._pipeline.set_aside(job_id))
        await self._tracker.changed(job)
        return job

    async def resume(self, job_id: str) -> Job:
        """Put a paused job back into the queue, where it has the place it had.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it is not paused.
        """
        await self._seen(job_id, Action.MAKE)
        job = await self._tracker.in_thread(self._queue.resume, job_id)
        if job is None:
            present = await self._tracker.get(job_id)
            raise FailedPrecondition(f"{job_id} is {present.state.value}; only a paused job can be resumed")
        await self._tracker.changed(job)
        self._pipeline.wake()
        return await self._estimated(job)

    async def delete(self, job_id: str) -> None:
        """Delete an ended job and its files.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it has not ended.
        """
        job = await self._seen(job_id, Action.MAKE)
        if not job.state.ended:
            raise FailedPrecondition(f"{job_id} is {job.state.value}; cancel it before deleting it")
        await self._to_the_end(self._pipeline.remove(job_id))

    async def video(self, job_id: str) -> AsyncIterator[bytes]:
        """The finished mp4 in pieces below 1 MiB.

        Raises:
            NotFound: there is no such job, or its file is gone.
            FailedPrecondition: it is not completed.
        """
        job = await self._seen(job_id)
        if job.state is not JobState.COMPLETED:
            raise FailedPrecondition(f"{job_id} is {job.state.value}; only a completed job has a video")
        info = await asyncio.to_thread(self._artifacts.found_video, job_id)
        return self._artifacts.pieces(job_id, VIDEO, 0, info.num_bytes)

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

    async def known_models(self) -> Mapping[str, ModelInfo]:
        """The variants now, or as they were when the fusion service last answered, those that cannot be run too.

        Raises:
            Unavailable: the fusion service never answered.
        """
        return await self._catalog.last_known()

    async def count_by_state(self, key_id: str | None = None) -> dict[JobState, int]:
        """Number of jobs in every state, of one key or of all."""
        return await self._tracker.count_by_state(key_id)

    async def _checked(
        self, submission: Submission, wishes: Sequence[tuple[str, gateway_pb2.GenerationParameters]], now_s: float
    ) -> list[ClipParameters]:
        """What is to be made of all wishes of a batch.

        Raises:
            InvalidRequest: with the violations of all of them, up to a hundred.
        """
        models = await self._catalog.last_known()
        treated = replace(submission, request_id="")
        wanted: list[ClipParameters] = []
        violations: list[FieldViolation] = []
        for path, parameters in wishes:
            try:
                image = await asyncio.to_thread(self._images.find, parameters.image_id) if parameters.image_id else None
                wanted.append(validate(treated, parameters, models, image, now_s))
                await self._fitting.require(wanted[-1])
            except InvalidRequest as error:
                violations += [
                    FieldViolation(v.field.replace("parameters", path, 1), v.description) for v in error.violations
                ]
                if len(violations) >= MAX_VIOLATIONS:
                    break
        if violations:
            # What is wrong with all jobs alike is told once.
            raise InvalidRequest(list(dict.fromkeys(violations))[:MAX_VIOLATIONS])
        return wanted

    async def _batch(self, batch_id: str) -> list[Job]:
        """All jobs of a batch, in their order."""
        wanted = JobFilter(batch_id=batch_id, oldest_first=True)
        page = await self._tracker.page(page_size=MAX_PAGE_SIZE, wanted=wanted)
        jobs = [*page.jobs]
        while page.next_page_token:
            page = await self._tracker.page(page_size=MAX_PAGE_SIZE, page_token=page.next_page_token, wanted=wanted)
            jobs += page.jobs
        return jobs

    def _note_created(self, job: Job) -> None:
        self._metrics.job_created()
        # What people wrote stays out of the log unless it was asked for.
        texts = {"prompt": job.parameters.prompt} if self._log_prompts else {}
        log.info("job created", job_id=job.id, key_id=job.submission.key_id, **texts)

    async def _seen(self, job_id: str, action: Action = Action.READ) -> Job:
        """The job, if the present caller sees it and may do this to it.

        Raises:
            NotFound: there is none, or it is not the caller's to see.
            PermissionDenied: this is not for the caller's role.
        """
        caller = current_caller()
        caller.require(action)
        job = await self._tracker.get(job_id)
        caller.require_job(job_id, job.submission.key_id)
        return job

    async def _estimated(self, job: Job) -> Job:
        return (await self._estimator.fill([job]))[0]

    async def _cancel(self, job_id: str) -> None:
        if await self._pipeline.cancel(job_id):
            await self._pipeline.discard_files(job_id)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something that must not stop half-way because its caller hung up."""
        task = asyncio.create_task(work)
        self._unbroken.add(task)
        task.add_done_callback(self._unbroken.discard)
        return await asyncio.shield(task)


def _of_caller(submission: Submission) -> Submission:
    """The submission as the present caller's, who must be one that makes jobs."""
    caller = current_caller()
    caller.require(Action.MAKE)
    return replace(submission, key_id=caller.key_id)
