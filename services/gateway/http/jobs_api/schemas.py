"""Jobs, models and pictures as JSON; names are those of the gRPC API, and messages are flat."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.http.sampling import SOLVERS
from services.gateway.jobs.domain import HIGHEST_PRIORITY, LOWEST_PRIORITY, Job, JobStage, JobState
from services.gateway.messages import video_url_path
from services.gateway.models import ModelInfo
from shared.memory.modes import VramMode
from shared.sampling_options import MAX_FLOW_SHIFT, MAX_GUIDANCE, MAX_SEED, MAX_STEPS, Solver
from shared.system_proto import vram_mode_to_proto

_MAX_TEXT = 5000
_MAX_UINT32 = 2**32 - 1
_OPTIONS = (
    "num_inference_steps",
    "video_guidance_scale",
    "audio_guidance_scale",
    "flow_shift",
    "slg_layer",
    "seed",
    "step_cache_threshold",
)
_PLAIN = ("video_negative_prompt", "audio_negative_prompt", "height", "width", "num_frames")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a lone surrogate, which is no character") from None
    return text


NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
Characters = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[Characters, Field(max_length=4 * _MAX_TEXT)]
Side = Annotated[int, Field(ge=1, le=_MAX_UINT32)]
Guidance = Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)]
Prompt = Annotated[
    Characters,
    Field(
        min_length=1,
        max_length=4 * _MAX_TEXT,
        description="Up to 5000 characters. Speech between <S> and <E>, sound after `Audio:`.",
        examples=["A bell in the fog. Audio: a deep bell, far away"],
    ),
]
Priority = Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY, description="Higher ones are begun first.")]


class ClipRequest(BaseModel):
    """What to make, but for the prompt; what is absent takes the model's default."""

    model_config = ConfigDict(extra="forbid")

    video_negative_prompt: Text | None = Field(default=None, description="What the video should not show.")
    audio_negative_prompt: Text | None = Field(default=None, description="What the sound should not have.")
    model: Annotated[Characters, Field(max_length=200)] = Field(
        default="", description="Variant, one of /v1/models; the first."
    )
    height: Side | None = Field(default=None, description="Of a frame in pixels; with width, or neither.")
    width: Side | None = Field(default=None, description="Of a frame in pixels; with height, or neither.")
    num_frames: Side | None = Field(default=None, description="Must be the variant's own.")
    image_id: Annotated[Characters, Field(max_length=200)] = Field(
        default="", description="First picture, as /v1/images gave it."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        default=None, description="Solver steps; 50."
    )
    video_guidance_scale: Guidance | None = Field(default=None, description="1: none; 4.")
    audio_guidance_scale: Guidance | None = Field(default=None, description="1: none; 3.")
    flow_shift: Annotated[float, Field(gt=0, le=MAX_FLOW_SHIFT)] | None = Field(
        default=None, description="Of the noise; 5."
    )
    solver: Solver | None = Field(default=None, description="unipc.")
    slg_layer: Annotated[int, Field(ge=0, le=_MAX_UINT32)] | None = Field(default=None, description="0: off; 11.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(default=None, description="Of the noise; 100.")
    step_cache_threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="LOSSY; 0: off.")
    vram_mode: VramMode | None = Field(
        default=None, description="How device memory is used; as the services do at present."
    )

    def template_fields(self) -> set[str]:
        """Those of this class that were given."""
        return self.model_fields_set & ClipRequest.model_fields.keys()

    def to_proto(self, prompt: str) -> pb.GenerationParameters:
        """The engine's form."""
        wanted = pb.GenerationParameters(prompt=prompt, model=self.model, image_id=self.image_id)
        for name in _PLAIN:
            if (value := getattr(self, name)) is not None:
                setattr(wanted, name, value)
        for name in _OPTIONS:
            if (value := getattr(self, name)) is not None:
                setattr(wanted.options, name, value)
        if self.solver is not None:
            wanted.options.solver = SOLVERS[self.solver.value]
        if self.vram_mode is not None:
            wanted.vram_mode = vram_mode_to_proto(self.vram_mode)
        return wanted


class JobRequest(ClipRequest):
    """A job to be made."""

    prompt: Prompt
    image: Characters | None = Field(default=None, description="First picture as a data URL, instead of an image_id.")
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,128}$")] = Field(
        default="", description="The same one gives the same job; so does an Idempotency-Key."
    )
    priority: Priority | None = None
    deadline_time: AwareDatetime | None = Field(default=None, description="Until when the work must have begun.")
    label: Annotated[Characters, Field(max_length=200, pattern=NO_CONTROLS)] = Field(
        default="", description="What you call it; lists can be filtered by it."
    )
    webhook_url: Characters | None = Field(default=None, max_length=2048, description="Is told when the job has ended.")

    @model_validator(mode="after")
    def _one_picture(self) -> JobRequest:
        if self.image is not None and self.image_id:
            raise ValueError("give image or image_id, not both")
        return self


class ProgressView(BaseModel):
    """How far a job is."""

    stage: JobStage
    done: int = Field(description="Steps or frames finished in this stage.")
    total: int = Field(description="Steps or frames of this stage; 0 where it has none.")
    fraction: float = Field(ge=0, le=1, description="Of the whole job.")


class ErrorView(BaseModel):
    """Why a job failed."""

    code: str = Field(description="gRPC status name.")
    message: str


class VideoView(BaseModel):
    """A finished clip."""

    url_path: str = Field(description="Under this port.")
    num_bytes: int
    height: int
    width: int
    num_frames: int
    fps: int
    steps_reused: int
    vram_mode: VramMode


class SetbackView(BaseModel):
    """Why work had to begin again."""

    time: datetime
    reason: str
    stage: JobStage = Field(description="What was being done; waiting where it does not matter.")
    worker: str = Field(description="Address of the worker that did it; empty where none had to do with it.")


class EstimateView(BaseModel):
    """When a job is expected to get on."""

    position: int = Field(description="Jobs that are begun before it.")
    start_time: datetime | None
    end_time: datetime | None


class JobView(BaseModel):
    """A job and all that is known of it."""

    id: str
    state: JobState
    parameters: dict[str, Any] = Field(description="What was asked, with every default filled in.")
    progress: ProgressView
    error: ErrorView | None
    video: VideoView | None
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    attempts: int = Field(description="How often its work was begun.")
    stage_seconds: dict[str, float]
    setbacks: list[SetbackView]
    request_id: str
    priority: int
    deadline_time: datetime | None
    batch_id: str
    label: str
    estimate: EstimateView | None


class JobList(BaseModel):
    """A page of jobs."""

    jobs: list[JobView]
    next_page_token: str = Field(description="Empty on the last page.")


class SizeView(BaseModel):
    """A picture size in pixels."""

    height: int
    width: int


class ModelView(BaseModel):
    """A variant that can be made."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["ovi"] = "ovi"
    created: int = 0
    sizes: list[SizeView] = Field(description="Common ones; any aspect of the same area is legal.")
    video_area: int = Field(description="Pixels of a frame before rounding.")
    num_frames: int
    fps: int
    num_layers: int
    precision: str
    device: str


class ModelList(BaseModel):
    """The variants; the first is the default."""

    object: Literal["list"] = "list"
    data: list[ModelView]


class QueueView(BaseModel):
    """The queue as a whole."""

    num_jobs: dict[JobState, int] = Field(description="By state.")
    wait_s: float | None = Field(description="Until a job that is created now is begun; null: not known yet.")


class ImageView(BaseModel):
    """A kept picture."""

    image_id: str
    height: int
    width: int


def job_view(job: Job) -> JobView:
    """The job as JSON."""
    asked, progress, video = job.submission, job.progress, job.video
    estimate = job.estimate
    return JobView(
        id=job.id,
        state=job.state,
        parameters=_parameters(job),
        progress=ProgressView(
            stage=progress.stage, done=progress.done, total=progress.total, fraction=progress.fraction
        ),
        error=ErrorView(code=job.failure.code, message=job.failure.message) if job.failure is not None else None,
        video=None
        if video is None
        else VideoView(
            url_path=video_url_path(job.id),
            num_bytes=video.num_bytes,
            height=video.height,
            width=video.width,
            num_frames=video.num_frames,
            fps=video.fps,
            steps_reused=video.steps_reused,
            vram_mode=video.vram_mode,
        ),
        create_time=_time(job.create_time_s),
        start_time=_time_or_none(job.start_time_s),
        end_time=_time_or_none(job.end_time_s),
        attempts=job.attempts,
        stage_seconds=dict(job.stage_seconds),
        setbacks=[
            SetbackView(time=_time(one.time_s), reason=one.reason, stage=one.stage, worker=one.worker)
            for one in job.setbacks
        ],
        request_id=asked.request_id,
        priority=asked.priority,
        deadline_time=_time_or_none(asked.deadline_time_s),
        batch_id=asked.batch_id,
        label=asked.label,
        estimate=None
        if estimate is None
        else EstimateView(
            position=estimate.position,
            start_time=_time_or_none(estimate.start_time_s),
            end_time=_time_or_none(estimate.end_time_s),
        ),
    )


def model_view(model: ModelInfo) -> ModelView:
    """The variant as JSON."""
    return ModelView(
        id=model.id,
        sizes=[SizeView(height=height, width=width) for height, width in model.sizes],
        video_area=model.video_area,
        num_frames=model.num_frames,
        fps=model.fps,
        num_layers=model.num_layers,
        precision=model.precision,
        device=model.device,
    )


def engine_field(field: str) -> str:
    """This API's name of one of the engine's fields: messages are flat here."""
    return field.removeprefix("parameters.").removeprefix("options.")


def _parameters(job: Job) -> dict[str, Any]:
    wanted, options = job.parameters, job.parameters.options
    values: dict[str, Any] = {name: getattr(wanted, name) for name in ("prompt", *_PLAIN, "model", "image_id")}
    values |= {name: getattr(options, name) for name in _OPTIONS}
    return values | {"solver": options.solver.value, "vram_mode": wanted.vram_mode.value}


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _time_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _time(seconds)
