"""Jobs in the words of OpenAI's videos API."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, Field

from services.gateway.jobs.domain import Job, JobState
from shared.shapes import FPS

REMIXED_FROM = "remixed_from"
"""Name in a job's extras."""
_POLL_MS = 1000
_LONGEST_POLL_MS = 10_000
_POLLS_OF_A_JOB = 50
"""About as often a client should look during a job."""

VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
_STATUSES: dict[JobState, VideoStatus] = {
    JobState.QUEUED: "queued",
    JobState.PAUSED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


class VideoError(BaseModel):
    """Why a video could not be made."""

    code: str
    message: str


class Video(BaseModel):
    """A video, made or being made."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int = Field(ge=0, le=100, description="Per cent.")
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None = Field(default=None, description="Unix seconds.")
    expires_at: int | None = Field(
        default=None, description="Unix seconds after which the files may go; null: they are kept."
    )
    prompt: str
    remixed_from_video_id: str | None = None
    seconds: str = Field(description="Length of the clip.")
    size: str = Field(description="WIDTHxHEIGHT, as it is made.")
    error: VideoError | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is gone."""

    id: str
    deleted: Literal[True] = True
    object: Literal["video.deleted"] = "video.deleted"


def video_of(job: Job, kept_s: float) -> Video:
    """The job as a video object.

    Args:
        job: is shown.
        kept_s: how long clips are kept after their end; 0: for ever, as far as their age goes.
    """
    wanted = job.parameters
    completed = job.state is JobState.COMPLETED
    return Video(
        id=job.id,
        model=wanted.model,
        status=_STATUSES[job.state],
        progress=math.floor(job.progress.fraction * 100),
        created_at=int(job.create_time_s),
        completed_at=int(job.end_time_s) if completed and job.end_time_s is not None else None,
        expires_at=int(job.end_time_s + kept_s) if kept_s and job.end_time_s is not None else None,
        prompt=wanted.prompt,
        remixed_from_video_id=job.submission.extras.get(REMIXED_FROM),
        seconds=str(wanted.num_frames // FPS),
        size=f"{wanted.width}x{wanted.height}",
        error=VideoError(code=job.failure.code.lower(), message=job.failure.message) if job.failure else None,
    )


def poll_after_ms(job: Job, now_s: float) -> int:
    """When to look again; clients read it on their first look and keep to it."""
    if job.estimate is None or job.estimate.end_time_s is None:
        return _POLL_MS
    left_s = max(0.0, job.estimate.end_time_s - now_s)
    return int(min(max(left_s * 1000 / _POLLS_OF_A_JOB, _POLL_MS), _LONGEST_POLL_MS))
