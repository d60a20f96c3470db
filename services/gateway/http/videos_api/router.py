"""`/v1/videos` as OpenAI's clients call it."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from services.gateway.artifacts import is_job_id
from services.gateway.http.backend import Backend
from services.gateway.http.bodies import json_object, request_id_of
from services.gateway.http.clips import ClipAnswers
from services.gateway.http.errors import in_words_of
from services.gateway.http.file_answer import FileAnswer
from services.gateway.http.ids import JobId
from services.gateway.http.openapi import ERRORS, JPEG, MP4, WEBP, body_of
from services.gateway.http.previews import Preview
from services.gateway.http.reading import FieldReader
from services.gateway.http.videos_api.fields import (
    CREATE_SCHEMA,
    ENGINE_NAMES,
    REFERENCE,
    keep_reference,
    read_create,
    read_fields,
)
from services.gateway.http.videos_api.objects import (
    REMIXED_FROM,
    DeletedVideo,
    Video,
    VideoList,
    poll_after_ms,
    video_of,
)
from services.gateway.jobs.domain import DEFAULT_PRIORITY, Job, Submission
from services.gateway.jobs.listing import JobFilter
from services.gateway.messages import parameters_to_proto
from shared.errors import InvalidRequest

_DEFAULT_LIMIT, _LARGEST_LIMIT = 20, 100
_POLL_HEADER = "openai-poll-after-ms"
_REMIX_SCHEMA = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {"prompt": {"type": "string", "minLength": 1}},
}


def videos_router(backend: Backend, clips: ClipAnswers) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/videos", tags=["OpenAI videos"], responses=ERRORS)
    _add_making(router, backend)
    _add_reading(router, backend, clips)
    return router


def _add_making(router: APIRouter, backend: Backend) -> None:
    engine = backend.engine

    @router.post("", openapi_extra=body_of(CREATE_SCHEMA, "multipart/form-data", "application/json"))
    async def create_video(request: Request, response: Response) -> Video:
        """Queue a video. An `Idempotency-Key` makes a repeated call safe."""
        backend.phase.require_serving()
        fields = await read_fields(request)
        wanted, priority = read_create(fields, await engine.known_models())
        if fields.get(REFERENCE) is not None:
            wanted.image_id = await keep_reference(engine, fields[REFERENCE])
        submission = Submission(
            request_id=request_id_of(request), priority=DEFAULT_PRIORITY if priority is None else priority
        )
        with in_words_of(ENGINE_NAMES):
            return _told(backend, await engine.create(submission, wanted), response)

    @router.post("/{video_id}/remix", openapi_extra=body_of(_REMIX_SCHEMA, "application/json"))
    async def remix_video(video_id: JobId, request: Request, response: Response) -> Video:
        """Queue a video with another prompt and everything else, the seed too, as before."""
        backend.phase.require_serving()
        reader = FieldReader(await json_object(request))
        reader.only({"prompt"})
        prompt = reader.text("prompt", required=True)
        reader.check()
        source = await engine.get(video_id)
        wanted = parameters_to_proto(source.parameters)
        wanted.prompt = prompt or ""
        submission = Submission(
            request_id=request_id_of(request),
            priority=source.submission.priority,
            extras={REMIXED_FROM: source.id},
        )
        with in_words_of(ENGINE_NAMES):
            return _told(backend, await engine.create(submission, wanted), response)


def _add_reading(router: APIRouter, backend: Backend, clips: ClipAnswers) -> None:
    engine = backend.engine

    @router.get("")
    async def list_videos(
        after: Annotated[str, Query(description="Id behind which the page begins.", max_length=64)] = "",
        limit: Annotated[int, Query(ge=1, le=_LARGEST_LIMIT)] = _DEFAULT_LIMIT,
        order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    ) -> VideoList:
        """A page of videos."""
        if after and not is_job_id(after):
            raise InvalidRequest.of("after", f"got {after!r}, allowed is the id of a video, or nothing")
        wanted = JobFilter(oldest_first=order == "asc", after_id=after)
        page = await engine.page(page_size=limit, page_token="", wanted=wanted)
        videos = [video_of(job, backend.kept_s) for job in page.jobs]
        return VideoList(
            data=videos,
            first_id=videos[0].id if videos else None,
            last_id=videos[-1].id if videos else None,
            has_more=bool(page.next_page_token),
        )

    @router.get("/{video_id}")
    async def retrieve_video(video_id: JobId, response: Response) -> Video:
        """A video, whatever became of it."""
        return _told(backend, await engine.get(video_id), response)

    @router.delete("/{video_id}")
    async def delete_video(video_id: JobId) -> DeletedVideo:
        """Delete a video and its files; one that is being made is stopped first."""
        await engine.cancel(video_id)
        await engine.delete(video_id)
        return DeletedVideo(id=video_id)

    @router.api_route(
        "/{video_id}/content",
        methods=["GET", "HEAD"],
        response_class=Response,
        responses={200: {"content": MP4 | WEBP | JPEG}},
        operation_id="video_content",
    )
    async def download_content(
        video_id: JobId, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> FileAnswer:
        """The clip, or a picture of it."""
        job = await engine.get(video_id)
        if variant == "video":
            return await clips.video(job, as_download=True)
        return await clips.preview(job, Preview(variant))


def _told(backend: Backend, job: Job, response: Response) -> Video:
    response.headers[_POLL_HEADER] = str(poll_after_ms(job, time.time()))
    return video_of(job, backend.kept_s)
