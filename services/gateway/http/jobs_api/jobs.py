"""`/v1/jobs`: the native REST API over the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.gateway.http.backend import Backend
from services.gateway.http.bodies import request_id_of
from services.gateway.http.clips import ClipAnswers
from services.gateway.http.errors import in_words_of
from services.gateway.http.file_answer import FileAnswer
from services.gateway.http.ids import JobId
from services.gateway.http.jobs_api.feeds import END_ID, JobFeeds
from services.gateway.http.jobs_api.schemas import NO_CONTROLS, JobList, JobRequest, JobView, engine_field, job_view
from services.gateway.http.openapi import ERRORS, JPEG, MP4, WEBP
from services.gateway.http.previews import Preview
from services.gateway.http.uploads import image_id_of
from services.gateway.http.webhooks.registry import Webhooks
from services.gateway.jobs.domain import DEFAULT_PRIORITY, JobState, Submission
from services.gateway.jobs.listing import JobFilter
from shared.errors import InvalidRequest

_DEFAULT_LIMIT, _LARGEST_LIMIT = 50, 1000
_EVENT_STREAM = "text/event-stream"
_NO_BUFFERING = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def jobs_router(backend: Backend, clips: ClipAnswers, webhooks: Webhooks) -> APIRouter:
    """The routes of jobs."""
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"], responses=ERRORS)
    engine = backend.engine

    @router.post("", status_code=201)
    async def create_job(wanted: JobRequest, request: Request, response: Response) -> JobView:
        """Queue a job. The same request_id, or Idempotency-Key, with the same body gives the same job."""
        backend.phase.require_serving()
        key = request_id_of(request)
        if key and wanted.request_id and key != wanted.request_id:
            raise InvalidRequest.of("request_id", f"got {wanted.request_id!r}, but the Idempotency-Key is another one")
        if wanted.webhook_url is not None:
            webhooks.check(wanted.webhook_url)
        parameters = wanted.to_proto(wanted.prompt)
        if wanted.image is not None:
            parameters.image_id = await image_id_of(engine, wanted.image, field="image")
        submission = Submission(
            request_id=wanted.request_id or key,
            priority=DEFAULT_PRIORITY if wanted.priority is None else wanted.priority,
            deadline_time_s=wanted.deadline_time.timestamp() if wanted.deadline_time is not None else None,
            label=wanted.label,
        )
        with in_words_of(engine_field):
            job = await engine.create(submission, parameters)
        if wanted.webhook_url is not None:
            await webhooks.add(job, wanted.webhook_url)
        response.headers["location"] = f"/v1/jobs/{job.id}"
        return job_view(job)

    @router.get("")
    async def list_jobs(
        limit: Annotated[int, Query(ge=1, le=_LARGEST_LIMIT)] = _DEFAULT_LIMIT,
        page_token: Annotated[str, Query(description="next_page_token of the page before.", max_length=200)] = "",
        state: Annotated[list[JobState], Query(description="Only jobs in these states.")] = [],  # noqa: B006
        batch_id: Annotated[str, Query(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")] = "",
        label: Annotated[str, Query(max_length=200, pattern=NO_CONTROLS)] = "",
        order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    ) -> JobList:
        """A page of jobs. One with long prompts may be shorter than its limit."""
        wanted = JobFilter(states=frozenset(state), batch_id=batch_id, label=label, oldest_first=order == "asc")
        page = await engine.page(page_size=limit, page_token=page_token, wanted=wanted)
        return JobList(jobs=[job_view(job) for job in page.jobs], next_page_token=page.next_page_token)

    @router.get("/{job_id}")
    async def get_job(job_id: JobId) -> JobView:
        """A job."""
        return job_view(await engine.get(job_id))

    _add_changes(router, backend)
    _add_files(router, backend, clips)
    _add_events(router, backend)
    return router


def _add_changes(router: APIRouter, backend: Backend) -> None:
    engine = backend.engine

    @router.delete("/{job_id}", status_code=204)
    async def delete_job(job_id: JobId) -> None:
        """Delete an ended job and its files."""
        await engine.delete(job_id)

    @router.post("/{job_id}/cancel")
    async def cancel_job(job_id: JobId) -> JobView:
        """Stop a job; one that has ended stays as it is."""
        return job_view(await engine.cancel(job_id))

    @router.post("/{job_id}/pause")
    async def pause_job(job_id: JobId) -> JobView:
        """Set a job aside; a running one goes on later from its last checkpoint."""
        return job_view(await engine.pause(job_id))

    @router.post("/{job_id}/resume")
    async def resume_job(job_id: JobId) -> JobView:
        """Put a paused job back into the queue."""
        return job_view(await engine.resume(job_id))


def _add_files(router: APIRouter, backend: Backend, clips: ClipAnswers) -> None:
    @router.api_route(
        "/{job_id}/video",
        methods=["GET", "HEAD"],
        response_class=Response,
        responses={200: {"content": MP4}},
        operation_id="job_video",
    )
    async def job_video(job_id: JobId) -> FileAnswer:
        """The finished clip; parts of it by Range."""
        return await clips.video(await backend.engine.get(job_id), as_download=False)

    for preview, media_type in ((Preview.THUMBNAIL, WEBP), (Preview.SPRITESHEET, JPEG)):
        _add_preview(router, backend, clips, preview, media_type)


def _add_preview(
    router: APIRouter, backend: Backend, clips: ClipAnswers, preview: Preview, media_type: dict[str, Any]
) -> None:
    @router.get(
        f"/{{job_id}}/{preview.value}",
        response_class=Response,
        responses={200: {"content": media_type}},
        operation_id=f"job_{preview.value}",
    )
    async def job_preview(job_id: JobId) -> FileAnswer:
        """A picture of the finished clip: its middle frame, or 5 x 5 of its frames."""
        return await clips.preview(await backend.engine.get(job_id), preview)


def _add_events(router: APIRouter, backend: Backend) -> None:
    feeds = JobFeeds(backend.engine, lambda job: job_view(job).model_dump_json())

    @router.get(
        "/{job_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {"content": {_EVENT_STREAM: {"schema": {"type": "string"}}}, "description": "`job` events: the job."},
            204: {"description": "Nothing will come any more: the last event was seen."},
        },
    )
    async def job_events(
        job_id: JobId, last_event_id: Annotated[str, Header(description="Go on behind this event.")] = ""
    ) -> Response:
        """Server-sent events: the job as it is, then after every change, until it has ended."""
        await backend.engine.get(job_id)
        if last_event_id == END_ID:
            return Response(status_code=204)
        events = await feeds.open(job_id, last_event_id)
        return StreamingResponse(events, media_type=_EVENT_STREAM, headers=_NO_BUFFERING)
