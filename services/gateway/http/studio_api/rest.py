"""`/api`: the studio's REST calls."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from services.gateway.http.backend import Backend
from services.gateway.http.bodies import json_object
from services.gateway.http.clips import ClipAnswers
from services.gateway.http.file_answer import FileAnswer
from services.gateway.http.openapi import MP4, STUDIO_ERRORS, body_of, ref_to
from services.gateway.http.studio_api.objects import (
    GenerationJob,
    Removed,
    StudioHealth,
    Submitted,
    generation_job_of,
    studio_id,
)
from services.gateway.http.studio_api.service import StudioService
from services.gateway.jobs.domain import JobState
from shared.errors import FailedPrecondition, NotFound

_SERVING = "SERVING"
_SUFFIX = ".mp4"


def studio_router(backend: Backend, studio: StudioService, clips: ClipAnswers) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/api", tags=["Studio"], responses=STUDIO_ERRORS)

    @router.get("/health")
    async def health() -> StudioHealth:
        """Whether work can be done."""
        stages, counts = await asyncio.gather(backend.clients.health(), backend.engine.count_by_state())
        loaded = all(state == _SERVING for state in stages.values())
        return StudioHealth(
            status="healthy" if loaded and backend.phase.serving else "starting",
            engine_loaded=loaded,
            queue_size=counts[JobState.QUEUED],
            total_jobs=sum(counts.values()),
        )

    @router.post("/generate", openapi_extra=body_of(ref_to(GenerationJob), "application/json"))
    async def generate(request: Request) -> Submitted:
        """Queue a job. The same one again is the same job."""
        job = await studio.submit(await json_object(request))
        return Submitted(job_id=studio_id(job), message="queued")

    @router.get("/jobs")
    async def list_jobs() -> list[GenerationJob]:
        """The newest thousand jobs, oldest first."""
        return [generation_job_of(job) for job in await studio.listed()]

    @router.get("/jobs/{job_id:path}")
    async def get_job(job_id: str) -> GenerationJob:
        """A job by the id its client chose."""
        return generation_job_of(await studio.find(job_id))

    @router.delete("/jobs/{job_id:path}")
    async def delete_job(job_id: str) -> Removed:
        """Delete a job and its files; one that has not ended is stopped first."""
        try:
            removed = await studio.remove(job_id)
        except FailedPrecondition as error:
            return Removed(status="error", message=error.message)
        return Removed(status="success", message=f"{removed} is deleted")

    @router.api_route(
        "/videos/{file:path}",
        methods=["GET", "HEAD"],
        response_class=Response,
        responses={200: {"content": MP4}},
        operation_id="studio_video",
    )
    async def video(file: str) -> FileAnswer:
        """A finished clip; parts of it by Range."""
        if not file.endswith(_SUFFIX):
            raise NotFound(f"{file[:64]!r} is no video; the name is a job's id and {_SUFFIX}")
        return await clips.video(await studio.find(file.removesuffix(_SUFFIX)), as_download=False)

    return router
