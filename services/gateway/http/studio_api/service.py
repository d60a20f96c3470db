"""What the studio can do, the same by REST and by Socket.IO."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ovi.common.v1 import system_pb2
from services.gateway.artifacts import is_job_id
from services.gateway.http.backend import Backend
from services.gateway.http.errors import in_words_of
from services.gateway.http.studio_api.objects import CREATED_AT, RESOLUTION, studio_id
from services.gateway.http.studio_api.requests import (
    ENGINE_NAMES,
    MAX_LABEL_CHARACTERS,
    StudioRequest,
    read_generation_job,
)
from services.gateway.http.uploads import image_id_of
from services.gateway.jobs.domain import Job, Submission
from services.gateway.jobs.listing import JobFilter
from shared.errors import AlreadyExists, InvalidRequest, NotFound
from shared.generation_proto import size_to_proto

MAX_LISTED = 1000
"""Jobs in the list, the newest of them; it has no pages."""


class StudioService:
    """Jobs by the ids that clients chose for them. Such an id is only a label: it is looked up, and names no file."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._engine = backend.engine

    async def submit(self, fields: Mapping[str, Any]) -> Job:
        """Queue a GenerationJob. The same one again is the same job.

        Raises:
            InvalidRequest: with every violation, in the studio's names.
            OviError: by the table.
        """
        self._backend.phase.require_serving()
        asked = read_generation_job(fields, await self._engine.known_models())
        await self._require_allocation(asked)
        if asked.image:
            asked.wanted.image_id = await image_id_of(self._engine, asked.image, field="image")
        submission = Submission(
            request_id=f"studio-{hashlib.sha256(asked.label.encode()).hexdigest()}",
            label=asked.label,
            extras={CREATED_AT: asked.created_at, RESOLUTION: asked.resolution},
        )
        try:
            with in_words_of(ENGINE_NAMES):
                return await self._engine.create(submission, asked.wanted)
        except AlreadyExists:
            what = f"got {asked.label[:80]!r}, which is the id of another job; choose a new one"
            raise InvalidRequest.of("id", what) from None

    async def find(self, text: str) -> Job:
        """The job that a client calls so.

        Raises:
            NotFound: there is none.
        """
        if is_job_id(text):
            return await self._engine.get(text)
        if text and len(text) <= MAX_LABEL_CHARACTERS and text.isprintable():
            page = await self._engine.page(page_size=1, page_token="", wanted=JobFilter(label=text))
            if page.jobs:
                return await self._engine.get(page.jobs[0].id)
        raise NotFound(f"there is no job {text[:64]!r}")

    async def cancel(self, text: str) -> Job:
        """Stop a job; one that has ended stays as it is.

        Raises:
            NotFound: there is none.
        """
        return await self._engine.cancel((await self.find(text)).id)

    async def remove(self, text: str) -> str:
        """Stop a job if it has not ended, and delete it with its files. Gives what the studio called it.

        Raises:
            NotFound: there is none.
        """
        job = await self.find(text)
        await self._engine.cancel(job.id)
        await self._engine.delete(job.id)
        return studio_id(job)

    async def listed(self, most: int = MAX_LISTED) -> list[Job]:
        """The newest jobs, oldest first."""
        jobs: list[Job] = []
        token = ""
        while len(jobs) < most:
            page = await self._engine.page(page_size=most - len(jobs), page_token=token, wanted=JobFilter())
            jobs += page.jobs
            token = page.next_page_token
            if not token:
                break
        return jobs[::-1]

    async def _require_allocation(self, asked: StudioRequest) -> None:
        """How work is spread over GPUs is decided when a stack is started; a job can only agree."""
        if not asked.allocation:
            return
        size = size_to_proto(asked.wanted.height, asked.wanted.width)
        request = system_pb2.GetPlanRequest(model=asked.wanted.model, size=size)
        present = (await self._backend.clients.fusion_plan(request)).allocation
        if asked.allocation != present:
            what = f"got {asked.allocation}, allowed is auto or {present}, as this stack was started"
            raise InvalidRequest.of("options.gpuAllocation", what)
