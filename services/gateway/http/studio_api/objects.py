"""Jobs in the studio's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from services.gateway.jobs.domain import Job, JobState
from services.gateway.messages import video_url_path
from shared.shapes import FPS

CREATED_AT, RESOLUTION = "studio_created_at", "studio_resolution"
"""Names in a job's extras. The clip may have another size than was asked for: rounded to a multiple of 32."""

StudioStatus = Literal["queued", "processing", "completed", "failed", "cancelled"]
_STATUSES: Mapping[JobState, StudioStatus] = {
    JobState.QUEUED: "queued",
    JobState.PAUSED: "queued",
    JobState.RUNNING: "processing",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


class GenerationOptions(BaseModel):
    """How to make a clip."""

    seed: int = 100
    steps: int = 50
    videoGuidance: float = 4.0
    audioGuidance: float = 3.0
    resolution: str = Field(default="960x960", description="HEIGHTxWIDTH.")
    duration: str = Field(default="10s", description="5s or 10s.")
    solver: str = Field(default="unipc", description="unipc, dpm++ or euler.")
    slgLayer: int = 11
    vramMode: str = Field(default="standard", description="standard, fp8, fp8_offload or ultra_low.")
    enableLora: bool = False
    gpuAllocation: str = Field(default="auto", description="auto, single, multi_2, multi_4, multi_8 or fsdp.")


class GenerationJob(BaseModel):
    """A job, in requests and answers."""

    id: str = Field(description="Chosen by the client; a label.")
    mode: Literal["t2v", "i2v"]
    prompt: str
    image: str | None = Field(default=None, description="A data URL or an upload id; in answers the upload id.")
    options: GenerationOptions = GenerationOptions()
    status: StudioStatus = "queued"
    progress: int | None = Field(default=None, ge=0, le=100)
    videoUrl: str | None = None
    error: str | None = None
    createdAt: str = Field(description="ISO 8601.")


class StudioHealth(BaseModel):
    """Whether work can be done, and how much there is."""

    status: str
    engine_loaded: bool
    queue_size: int
    total_jobs: int


class Submitted(BaseModel):
    """A job was taken."""

    status: Literal["success"] = "success"
    job_id: str
    message: str


class Removed(BaseModel):
    """What became of a deletion."""

    status: Literal["success", "error"]
    message: str


@dataclass(frozen=True)
class Update:
    """What clients are told when a job has moved; all five every time, since they overwrite what is missing."""

    id: str
    status: StudioStatus
    progress: int
    videoUrl: str | None
    error: str | None


def studio_id(job: Job) -> str:
    """What the studio calls a job: its client's label, or the id of one that came another way."""
    return job.submission.label or job.id


def update_of(job: Job) -> Update:
    """The job's present state for clients."""
    return Update(
        id=studio_id(job),
        status=_STATUSES[job.state],
        progress=math.floor(job.progress.fraction * 100),
        videoUrl=video_url_path(job.id) if job.state is JobState.COMPLETED else None,
        error=job.failure.message if job.failure is not None else None,
    )


def generation_job_of(job: Job) -> GenerationJob:
    """The job with everything that was asked."""
    wanted, options, now = job.parameters, job.parameters.options, update_of(job)
    created = datetime.fromtimestamp(job.create_time_s, UTC).isoformat(timespec="milliseconds")
    asked: dict[str, Any] = {
        "seed": options.seed,
        "steps": options.num_inference_steps,
        "videoGuidance": options.video_guidance_scale,
        "audioGuidance": options.audio_guidance_scale,
        "resolution": job.submission.extras.get(RESOLUTION) or f"{wanted.height}x{wanted.width}",
        "duration": f"{wanted.num_frames // FPS}s",
        "solver": options.solver.value,
        "slgLayer": options.slg_layer,
        "vramMode": wanted.vram_mode.value,
    }
    return GenerationJob(
        id=now.id,
        mode="i2v" if wanted.image_id else "t2v",
        prompt=wanted.prompt,
        image=wanted.image_id or None,
        options=GenerationOptions(**asked),
        status=now.status,
        progress=now.progress,
        videoUrl=now.videoUrl,
        error=now.error,
        createdAt=job.submission.extras.get(CREATED_AT) or created.replace("+00:00", "Z"),
    )
