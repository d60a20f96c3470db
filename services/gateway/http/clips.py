"""Finished clips and their previews as answers."""

from __future__ import annotations

import asyncio
from functools import partial

from services.gateway.artifacts import VIDEO
from services.gateway.disk import disk_full_is_said
from services.gateway.http.backend import Backend
from services.gateway.http.errors import VideoNotReady
from services.gateway.http.file_answer import FileAnswer
from services.gateway.http.previews import Preview, PreviewMaker
from services.gateway.jobs.domain import Job, JobState
from services.gateway.objects import ObjectInfo
from shared.errors import NotFound


class ClipAnswers:
    """Serves the files of completed jobs; parts of them by Range."""

    def __init__(self, backend: Backend) -> None:
        self._artifacts = backend.artifacts
        self._previews = PreviewMaker()

    async def video(self, job: Job, *, as_download: bool) -> FileAnswer:
        """The mp4.

        Args:
            job: whose.
            as_download: tell a browser to save it rather than to play it.

        Raises:
            VideoNotReady: the job is not completed.
            NotFound: its file is gone.
            ArtifactsAway: the artifact store cannot be reached.
        """
        _require_completed(job)
        info = await asyncio.to_thread(self._artifacts.found_video, job.id)
        pieces = partial(self._artifacts.pieces, job.id, VIDEO)
        return FileAnswer(info, pieces, media_type="video/mp4", filename=f"{job.id}.mp4", as_download=as_download)

    async def preview(self, job: Job, preview: Preview) -> FileAnswer:
        """A picture of the clip.

        Raises:
            VideoNotReady: the job is not completed.
            NotFound: its file is gone.
            CorruptTensor: the clip cannot be decoded.
            ArtifactsAway: the artifact store cannot be reached.
        """
        _require_completed(job)
        info = await asyncio.to_thread(self._artifacts.find, job.id, preview.file_name)
        if info is None:
            picture = await self._previews.make(job.id, self._artifacts.read, preview)
            with disk_full_is_said():
                info = await asyncio.to_thread(self._keep, job.id, preview, picture)
        pieces = partial(self._artifacts.pieces, job.id, preview.file_name)
        filename = f"{job.id}-{preview.file_name}"
        return FileAnswer(info, pieces, media_type=preview.media_type, filename=filename, as_download=False)

    def _keep(self, job_id: str, preview: Preview, picture: bytes) -> ObjectInfo:
        self._artifacts.write(job_id, preview.file_name, picture)
        kept = self._artifacts.find(job_id, preview.file_name)
        if kept is None or self._artifacts.find(job_id) is None:
            # It was deleted meanwhile, and the picture goes after it.
            self._artifacts.delete(job_id)
            raise NotFound(f"{job_id} was deleted")
        return kept


def _require_completed(job: Job) -> None:
    if job.state is not JobState.COMPLETED:
        raise VideoNotReady(f"{job.id} has no video: it is {job.state.value}")
