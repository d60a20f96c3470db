"""A job: what was asked, how far it is, how it ended. Knows nothing of wires and databases."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
JOB_ID_PATTERN = r"job_[0-9A-HJKMNP-TV-Z]{26}"
"""What ids look like; anything else never reaches a path or a query."""


class JobState(enum.Enum):
    """Where a job is in its life; values are those of the table."""

    QUEUED = "queued"
    PAUSED = "paused"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True for the three states that are never left."""
        return self not in UNFINISHED


UNFINISHED = frozenset({JobState.QUEUED, JobState.PAUSED, JobState.RUNNING})

LOWEST_PRIORITY, HIGHEST_PRIORITY = 0, 9
DEFAULT_PRIORITY = 5


class JobStage(enum.Enum):
    """What a running job is doing."""

    WAITING = "waiting"
    ENCODE_PROMPT = "encode_prompt"
    ENCODE_IMAGE = "encode_image"
    DENOISE = "denoise"
    DECODE = "decode"
    DONE = "done"


_SHARES: Mapping[JobStage, tuple[float, float]] = {
    JobStage.WAITING: (0.0, 0.0),
    JobStage.ENCODE_PROMPT: (0.0, 0.02),
    JobStage.ENCODE_IMAGE: (0.02, 0.04),
    JobStage.DENOISE: (0.04, 0.85),
    JobStage.DECODE: (0.85, 1.0),
    JobStage.DONE: (1.0, 1.0),
}
"""Part of the whole job at which a stage begins and ends."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    stage: JobStage = JobStage.WAITING
    done: int = 0
    """Steps or frames finished in this stage."""
    total: int = 0
    """Steps or frames of this stage; 0 where it has none."""

    @property
    def fraction(self) -> float:
        """Part of the whole job that is finished, 0 to 1."""
        begin, end = _SHARES[self.stage]
        return begin + (end - begin) * (min(self.done, self.total) / self.total if self.total else 0.0)


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed."""

    code: str
    """gRPC status name."""
    message: str
    """What happened and what to do."""


@dataclass(frozen=True)
class VideoInfo:
    """A finished clip."""

    num_bytes: int
    height: int
    width: int
    num_frames: int
    fps: int
    steps_reused: int = 0
    """Solver steps that the step cache took from earlier ones."""
    vram_mode: VramMode = VramMode.AUTO
    """In which it was denoised; AUTO: not known, the clip is an older version's."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"vram_mode": self.vram_mode.value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VideoInfo:
        """From what `to_json` gave, of this version or an older one."""
        return cls(**{**values, "vram_mode": VramMode(values.get("vram_mode", VramMode.AUTO.value))})


@dataclass(frozen=True)
class ClipParameters:
    """What to make, every default filled in, every limit checked."""

    prompt: str
    video_negative_prompt: str
    audio_negative_prompt: str
    model: str
    height: int
    width: int
    num_frames: int
    options: SamplingOptions
    image_id: str = ""
    """SHA-256 of an uploaded first picture in hex digits; empty for text to video."""
    vram_mode: VramMode = VramMode.AUTO
    """How device memory is to be used; AUTO: as the services do at present."""


@dataclass(frozen=True)
class Submission:
    """Who asks for a job, and how it is to be treated; what it makes is in its parameters."""

    request_id: str = ""
    """Chosen by the client: the same one of the same key gives the same job; empty or 1 to 128 of [A-Za-z0-9._-]."""
    key_id: str = ""
    """Of the API key that asks; empty where there are no keys."""
    priority: int = DEFAULT_PRIORITY
    """0 to 9; higher ones are begun first."""
    deadline_time_s: float | None = None
    """Unix seconds until which the work must have begun; None: whenever it is its turn."""
    batch_id: str = ""
    """Shared by jobs that were created together; empty for a single one."""
    label: str = ""
    """What a client calls the job; jobs can be found by it, and it never becomes a path."""
    extras: Mapping[str, str] = field(default_factory=dict)
    """What the API that took the request wants to remember with the job."""


@dataclass(frozen=True)
class Setback:
    """Why work on a job had to begin again."""

    time_s: float
    """Unix seconds."""
    reason: str
    """What happened, for people."""
    stage: JobStage = JobStage.WAITING
    """What was being done; WAITING where it does not matter."""
    worker: str = ""
    """Address of the worker that did it; empty: no worker had to do with it."""

    def to_json(self) -> list[Any]:
        """As JSON values."""
        return [self.time_s, self.reason[:1000], self.stage.value, self.worker[:300]]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Setback:
        """From what `to_json` gave, of this version or an older one, which told time and reason."""
        time_s, reason, *rest = values
        return cls(time_s, reason, JobStage(rest[0]), rest[1]) if rest else cls(time_s, reason)


@dataclass(frozen=True)
class Estimate:
    """When a job that waits or runs is expected to get on. Times are Unix seconds."""

    position: int
    """Jobs that are begun before it; 0 for the next one and for a running one."""
    start_time_s: float | None
    """When its work begins; None: nothing is known yet of how long such jobs take."""
    end_time_s: float | None
    """When it ends; None likewise."""


@dataclass(frozen=True)
class Job:
    """A job and all that is known of it. Times are Unix seconds."""

    id: str
    parameters: ClipParameters
    create_time_s: float
    submission: Submission = Submission()
    state: JobState = JobState.QUEUED
    progress: Progress = Progress()
    failure: JobFailure | None = None
    video: VideoInfo | None = None
    start_time_s: float | None = None
    end_time_s: float | None = None
    attempts: int = 0
    """How often its work was begun."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds each finished stage took."""
    setbacks: tuple[Setback, ...] = ()
    """Why work was begun again, oldest first."""
    owner: str = ""
    """Executor id of the gateway that works on it; empty: none does."""
    estimate: Estimate | None = None
    """Of a job that waits or runs, where it was asked for."""

    def at(self, progress: Progress) -> Job:
        """The same job, further on."""
        return replace(self, progress=progress)


@dataclass(frozen=True)
class Ending:
    """A terminal state and what belongs to it."""

    state: JobState
    failure: JobFailure | None = None
    video: VideoInfo | None = None

    def __post_init__(self) -> None:
        fits = {
            JobState.COMPLETED: self.video is not None and self.failure is None,
            JobState.FAILED: self.failure is not None and self.video is None,
            JobState.CANCELLED: self.failure is None and self.video is None,
        }
        if not fits.get(self.state, False):
            raise ValueError(f"a job cannot end {self.state} with failure={self.failure}, video={self.video}")

    @classmethod
    def completed(cls, video: VideoInfo) -> Ending:
        """The clip is there."""
        return cls(JobState.COMPLETED, video=video)

    @classmethod
    def failed(cls, code: str, message: str) -> Ending:
        """It could not be made; `code` is a gRPC status name."""
        return cls(JobState.FAILED, failure=JobFailure(code, message))

    @classmethod
    def cancelled(cls) -> Ending:
        """Stopped on request."""
        return cls(JobState.CANCELLED)


def new_job_id() -> str:
    """A fresh id: `job_`, then a ULID (48 bits of milliseconds, 80 random bits, in Crockford's base 32)."""
    return f"job_{_ulid()}"


def new_batch_id() -> str:
    """A fresh id: `batch_`, then a ULID."""
    return f"batch_{_ulid()}"


def _ulid() -> str:
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
