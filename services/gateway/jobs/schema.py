"""The tables of jobs, and rows to jobs and back. `services.gateway.migrations` makes them."""

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
    Setback,
    Submission,
    VideoInfo,
)
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    # Order of acceptance; a clock that goes back does not disturb it.
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, nullable=False),
    sa.Column("key_id", sa.String, nullable=False),
    sa.Column("request_id", sa.String),
    sa.Column("request_hash", sa.String, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    # Ascending order of beginning within a key; see `services.gateway.jobs.admission`.
    sa.Column("rank", sa.Float, nullable=False),
    sa.Column("deadline_time_s", sa.Float),
    sa.Column("batch_id", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("extras", sa.JSON, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("cost_class", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    # Empty: nobody works on it.
    sa.Column("owner", sa.String, nullable=False),
    # How often its owner was lost.
    sa.Column("owners_lost", sa.Integer, nullable=False),
    sa.Column("setbacks", sa.JSON, nullable=False),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("done", sa.Integer, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("error_code", sa.String),
    sa.Column("error_message", sa.String),
    sa.Column("video", sa.JSON(none_as_null=True)),
    # Of all its files.
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("create_time_s", sa.Float, nullable=False),
    sa.Column("start_time_s", sa.Float),
    sa.Column("end_time_s", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("stage_seconds", sa.JSON, nullable=False),
    sa.UniqueConstraint("id", name="uq_jobs_id"),
    sa.UniqueConstraint("key_id", "request_id", name="uq_jobs_request"),
    sa.Index("ix_jobs_state_seq", "state", "seq"),
    # Has all that admission and positions look at.
    sa.Index("ix_jobs_queue", "state", "key_id", "rank", "seq", "priority", "cost_class"),
    sa.Index("ix_jobs_key_state_seq", "key_id", "state", "seq"),
    sa.Index("ix_jobs_key_seq", "key_id", "seq"),
    sqlite_autoincrement=True,
)
# A query uses a partial index only if it has the same condition, with the same literals.
has_batch = jobs.c.batch_id > sa.literal_column("''")
has_label = jobs.c.label > sa.literal_column("''")


def _partial(name: str, *columns: sa.Column[Any], where: sa.ColumnElement[bool]) -> sa.Index:
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


_partial("ix_jobs_batch", jobs.c.batch_id, jobs.c.seq, where=has_batch)
_partial("ix_jobs_label", jobs.c.label, jobs.c.seq, where=has_label)
_partial("ix_jobs_label_state", jobs.c.label, jobs.c.state, jobs.c.seq, where=has_label)
_partial("ix_jobs_label_key", jobs.c.label, jobs.c.key_id, jobs.c.seq, where=has_label)
_partial("ix_jobs_label_key_state", jobs.c.label, jobs.c.key_id, jobs.c.state, jobs.c.seq, where=has_label)
_partial("ix_jobs_deadline", jobs.c.deadline_time_s, where=jobs.c.deadline_time_s.is_not(None))
_partial("ix_jobs_end", jobs.c.end_time_s, jobs.c.num_bytes, where=jobs.c.end_time_s.is_not(None))

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("executor_id", sa.String, primary_key=True),
    # By the database's clock.
    sa.Column("until_s", sa.Float, nullable=False),
)

key_usage = sa.Table(
    "key_usage",
    metadata,
    sa.Column("key_id", sa.String, primary_key=True),
    # Days since 1970 in UTC.
    sa.Column("day", sa.Integer, nullable=False),
    # Jobs created on that day, deleted ones among them.
    sa.Column("created", sa.Integer, nullable=False),
    # When one of its jobs was last begun.
    sa.Column("served_time_s", sa.Float, nullable=False),
)


def row_of(job: Job, request_hash: str, *, rank: float, cost_class: str) -> dict[str, Any]:
    """The columns of a new job."""
    asked = job.submission
    return {
        "id": job.id,
        "key_id": asked.key_id,
        "request_id": asked.request_id or None,
        "request_hash": request_hash,
        "priority": asked.priority,
        "rank": rank,
        "deadline_time_s": asked.deadline_time_s,
        "batch_id": asked.batch_id,
        "label": asked.label,
        "extras": dict(asked.extras),
        "parameters": parameters_to_json(job.parameters),
        "cost_class": cost_class,
        "state": job.state.value,
        "owner": "",
        "owners_lost": 0,
        "setbacks": [],
        "stage": job.progress.stage.value,
        "done": job.progress.done,
        "total": job.progress.total,
        "num_bytes": 0,
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
        submission=Submission(
            request_id=row["request_id"] or "",
            key_id=row["key_id"],
            priority=row["priority"],
            deadline_time_s=row["deadline_time_s"],
            batch_id=row["batch_id"],
            label=row["label"],
            extras=row["extras"],
        ),
        state=JobState(row["state"]),
        progress=Progress(JobStage(row["stage"]), row["done"], row["total"]),
        failure=JobFailure(row["error_code"], row["error_message"]) if failed else None,
        video=VideoInfo.from_json(row["video"]) if row["video"] is not None else None,
        start_time_s=row["start_time_s"],
        end_time_s=row["end_time_s"],
        attempts=row["attempts"],
        stage_seconds=row["stage_seconds"],
        setbacks=tuple(map(Setback.from_json, row["setbacks"])),
        owner=row["owner"],
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
