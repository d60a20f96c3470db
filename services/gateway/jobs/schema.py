"""The jobs table, and rows to jobs and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from services.gateway.jobs.domain import (
    ClipParameters,
    Job,
    JobFailure,
    JobStage,
    JobState,
    Progress,
    VideoInfo,
)
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    # Order of acceptance; a clock that goes back does not disturb it.
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("request_id", sa.String, unique=True),
    sa.Column("request_hash", sa.String, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("done", sa.Integer, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("error_code", sa.String),
    sa.Column("error_message", sa.String),
    sa.Column("video", sa.JSON(none_as_null=True)),
    sa.Column("create_time_s", sa.Float, nullable=False),
    sa.Column("start_time_s", sa.Float),
    sa.Column("end_time_s", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("stage_seconds", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)


def row_of(job: Job, request_hash: str) -> dict[str, Any]:
    """The columns of a new job."""
    return {
        "id": job.id,
        "request_id": job.request_id or None,
        "request_hash": request_hash,
        "parameters": parameters_to_json(job.parameters),
        "state": job.state.value,
        "stage": job.progress.stage.value,
        "done": job.progress.done,
        "total": job.progress.total,
        "create_time_s": job.create_time_s,
        "attempts": job.attempts,
        "stage_seconds": dict(job.stage_seconds),
    }


def job_of(row: sa.RowMapping) -> Job:
    """The job of a row."""
    failed = row["error_code"] is not None
    return Job(
        id=row["id"],
        parameters=parameters_from_json(row["parameters"]),
        create_time_s=row["create_time_s"],
        request_id=row["request_id"] or "",
        state=JobState(row["state"]),
        progress=Progress(JobStage(row["stage"]), row["done"], row["total"]),
        failure=JobFailure(row["error_code"], row["error_message"]) if failed else None,
        video=VideoInfo.from_json(row["video"]) if row["video"] is not None else None,
        start_time_s=row["start_time_s"],
        end_time_s=row["end_time_s"],
        attempts=row["attempts"],
        stage_seconds=row["stage_seconds"],
    )


def parameters_to_json(parameters: ClipParameters) -> dict[str, Any]:
    """As JSON values."""
    return json.loads(json.dumps(asdict(parameters), default=lambda value: value.value))


def parameters_from_json(values: Mapping[str, Any]) -> ClipParameters:
    """From what `parameters_to_json` gave, of this version or an older one."""
    options = dict(values["options"])
    options["solver"] = Solver(options["solver"])
    mode = VramMode(values.get("vram_mode", VramMode.AUTO.value))
    return ClipParameters(**{**values, "options": SamplingOptions(**options), "vram_mode": mode})
