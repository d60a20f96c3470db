"""Finished clips and their previews as answers."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from fastapi.responses import FileResponse

from services.gateway.artifacts import settle
from services.gateway.disk import disk_full_is_said
from services.gateway.http.backend import Backend
from services.gateway.http.errors import VideoNotReady
from services.gateway.http.previews import Preview, PreviewMaker
from services.gateway.jobs.domain import Job, JobState
from shared.errors import NotFound


class ClipAnswers:
    """Serves the files of completed jobs; parts of them by Range."""

    def __init__(self, backend: Backend) -> None:
        self._artifacts = backend.artifacts
        self._previews = PreviewMaker()

    def video(self, job: Job, *, as_download: bool) -> FileResponse:
        """The mp4.

        Args:
            job: whose.
            as_download: tell a browser to save it rather than to play it.

        Raises:
            VideoNotReady: the job is not completed.
            NotFound: its file is gone.
        """
        _require_completed(job)
        path = self._artifacts.video_path(job.id)
        if not path.is_file():
            raise NotFound(f"the video of {job.id} is gone from the data folder; create the job again")
        kind = "attachment" if as_download else "inline"
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4", content_disposition_type=kind)

    async def preview(self, job: Job, preview: Preview) -> FileResponse:
        """A picture of the clip.

        Raises:
            VideoNotReady: the job is not completed.
            NotFound: its file is gone.
            CorruptTensor: the clip cannot be decoded.
        """
        _require_completed(job)
        clip = self._artifacts.video_path(job.id)
        path = clip.with_name(preview.file_name)
        if not path.is_file():
            if not clip.is_file():
                raise NotFound(f"the video of {job.id} is gone from the data folder; create the job again")
            picture = await self._previews.make(clip, preview)
            with disk_full_is_said():
                await asyncio.to_thread(_keep, path, picture)
        return FileResponse(
            path,
            media_type=preview.media_type,
            filename=f"{job.id}-{preview.file_name}",
            content_disposition_type="inline",
        )


def _keep(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(data)
        settle(temporary, path)
    except FileNotFoundError:
        raise NotFound(f"{path.parent.name} was deleted") from None
    finally:
        temporary.unlink(missing_ok=True)


def _require_completed(job: Job) -> None:
    if job.state is not JobState.COMPLETED:
        raise VideoNotReady(f"{job.id} has no video: it is {job.state.value}")
