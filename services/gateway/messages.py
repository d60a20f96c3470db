"""Jobs, models and their words as protobuf."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.auth.caller import link
from services.gateway.jobs.domain import (
    DEFAULT_PRIORITY,
    ClipParameters,
    Job,
    JobStage,
    JobState,
    Setback,
    Submission,
)
from services.gateway.jobs.listing import JobFilter
from services.gateway.models import ModelInfo
from shared.errors import InvalidRequest
from shared.generation_proto import sampling_options_to_proto, size_to_proto
from shared.system_proto import vram_mode_to_proto

_STATES = {
    JobState.QUEUED: pb.JOB_STATE_QUEUED,
    JobState.PAUSED: pb.JOB_STATE_PAUSED,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.COMPLETED: pb.JOB_STATE_COMPLETED,
    JobState.FAILED: pb.JOB_STATE_FAILED,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
}
_STATES_FROM_PROTO = {proto: state for state, proto in _STATES.items()}
_STAGES = {
    JobStage.WAITING: pb.JOB_STAGE_UNSPECIFIED,
    JobStage.ENCODE_PROMPT: pb.JOB_STAGE_ENCODE_PROMPT,
    JobStage.ENCODE_IMAGE: pb.JOB_STAGE_ENCODE_IMAGE,
    JobStage.DENOISE: pb.JOB_STAGE_DENOISE,
    JobStage.DECODE: pb.JOB_STAGE_DECODE,
    JobStage.DONE: pb.JOB_STAGE_DONE,
}


def video_url_path(job_id: str) -> str:
    """Path of a finished clip under the HTTP port, for the present caller."""
    return link(f"/api/videos/{job_id}.mp4")


def states_from_proto(values: Iterable[pb.JobState.ValueType]) -> set[JobState]:
    """The states of a filter; UNSPECIFIED among them means any.

    Raises:
        InvalidRequest: a number that has no name.
    """
    wanted = set(values)
    if unknown := wanted - set(_STATES_FROM_PROTO) - {pb.JOB_STATE_UNSPECIFIED}:
        names = ", ".join(pb.JobState.Name(value) for value in _STATES_FROM_PROTO)
        raise InvalidRequest.of("states", f"got {sorted(unknown)}, allowed is {names}")
    return set() if pb.JOB_STATE_UNSPECIFIED in wanted else {_STATES_FROM_PROTO[value] for value in wanted}


def submission_from_proto(request: pb.CreateJobRequest | pb.BatchCreateRequest) -> Submission:
    """How the jobs of a request are to be treated; who asks is not in it."""
    return Submission(
        request_id=request.request_id,
        priority=request.priority if request.HasField("priority") else DEFAULT_PRIORITY,
        # Its seconds may be any 64-bit number.
        deadline_time_s=request.deadline.seconds + request.deadline.nanos / 1e9
        if request.HasField("deadline")
        else None,
        label=request.label,
    )


def filter_from_proto(request: pb.ListJobsRequest) -> JobFilter:
    """Which jobs a list has.

    Raises:
        InvalidRequest: a state that has no name.
    """
    return JobFilter(
        states=frozenset(states_from_proto(request.states)),
        key_id=request.key_id if request.HasField("key_id") else None,
        batch_id=request.batch_id,
        label=request.label,
        oldest_first=request.oldest_first,
    )


def job_to_proto(job: Job) -> pb.Job:
    """The wire form of a job."""
    message = pb.Job(
        id=job.id,
        state=_STATES[job.state],
        parameters=parameters_to_proto(job.parameters),
        progress=pb.JobProgress(
            stage=_STAGES[job.progress.stage],
            done=job.progress.done,
            total=job.progress.total,
            fraction=job.progress.fraction,
        ),
        create_time=_timestamp(job.create_time_s),
        start_time=_timestamp(job.start_time_s),
        end_time=_timestamp(job.end_time_s),
        attempts=job.attempts,
        stage_seconds=job.stage_seconds,
        request_id=job.submission.request_id,
        priority=job.submission.priority,
        deadline=_timestamp(job.submission.deadline_time_s),
        label=job.submission.label,
        batch_id=job.submission.batch_id,
        key_id=job.submission.key_id,
        setbacks=map(_setback_to_proto, job.setbacks),
    )
    if job.estimate is not None:
        message.estimate.position = job.estimate.position
        for field, time_s in (("start_time", job.estimate.start_time_s), ("end_time", job.estimate.end_time_s)):
            if time_s is not None:
                getattr(message.estimate, field).CopyFrom(_timestamp(time_s))
    if job.failure is not None:
        message.error.code, message.error.message = job.failure.code, job.failure.message
    if job.video is not None:
        message.video.MergeFrom(
            pb.Video(
                num_bytes=job.video.num_bytes,
                size=size_to_proto(job.video.height, job.video.width),
                num_frames=job.video.num_frames,
                fps=job.video.fps,
                url_path=video_url_path(job.id),
                steps_reused=job.video.steps_reused,
                vram_mode=vram_mode_to_proto(job.video.vram_mode),
            )
        )
    return message


def _setback_to_proto(setback: Setback) -> pb.Setback:
    return pb.Setback(
        time=_timestamp(setback.time_s), reason=setback.reason, stage=_STAGES[setback.stage], worker=setback.worker
    )


def model_to_proto(model: ModelInfo) -> pb.Model:
    """The wire form of a variant."""
    return pb.Model(
        id=model.id,
        sizes=[size_to_proto(*size) for size in model.sizes],
        num_frames=model.num_frames,
        fps=model.fps,
        precision=model.precision,
        device=model.device,
        num_layers=model.num_layers,
        video_area=model.video_area,
    )


def parameters_to_proto(parameters: ClipParameters) -> pb.GenerationParameters:
    """The wire form of what was asked, every field set."""
    return pb.GenerationParameters(
        prompt=parameters.prompt,
        video_negative_prompt=parameters.video_negative_prompt,
        audio_negative_prompt=parameters.audio_negative_prompt,
        model=parameters.model,
        height=parameters.height,
        width=parameters.width,
        num_frames=parameters.num_frames,
        options=sampling_options_to_proto(parameters.options),
        image_id=parameters.image_id,
        vram_mode=vram_mode_to_proto(parameters.vram_mode),
    )


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    stamp = Timestamp()
    # What a double can tell of such a number.
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
