"""The jobs table's operations on single jobs and lists. Synchronous and thread-safe; each is one transaction.

The table is the truth about jobs. A running job belongs to one gateway, its owner, and every write of its work is
refused once it has another: a gateway that was given up for dead and comes back changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.gateway.auth.caller import no_such_job
from services.gateway.jobs import admission
from services.gateway.jobs.admission import Limits, NoLimits
from services.gateway.jobs.costs import cost_class
from services.gateway.jobs.domain import UNFINISHED, Ending, Job, JobStage, JobState, Progress, Setback
from services.gateway.jobs.listing import JobFilter, JobPage, read_page
from services.gateway.jobs.schema import job_of, jobs, key_usage, row_of
from services.gateway.jobs.signals import Signal, send
from shared.errors import AlreadyExists, FailedPrecondition, QuotaExceeded

_UNFINISHED = [state.value for state in UNFINISHED]
MAX_SETBACKS = 20
"""Kept of a job, the last ones."""


class JobStore:
    """Jobs in a database."""

    def __init__(self, engine: sa.Engine, owner: str = "", limits: Limits | None = None) -> None:
        """
        Args:
            engine: of a database that was migrated.
            owner: executor id of this gateway; what it works on is owned by this name.
            limits: of API keys; None: no limits.
        """
        self._engine = engine
        self._owner = owner
        self._limits = limits or NoLimits()

    def create(self, job: Job, request_hash: str) -> Job:
        """Keep a new job; with a request_id seen before from the same key, the job kept then.

        Raises:
            AlreadyExists: the request_id was used with other parameters.
            QuotaExceeded: the key has made its jobs of the day.
        """
        return self.create_all([job], request_hash)[0]

    def create_all(self, new: Sequence[Job], request_hash: str) -> list[Job]:
        """Keep new jobs of one key, all or none; with request_ids seen before, the jobs kept then.

        Raises:
            AlreadyExists: a request_id was used with other parameters.
            QuotaExceeded: the key would have more than its jobs of the day.
        """
        rows = [
            row_of(
                job,
                request_hash,
                rank=admission.rank(job.create_time_s, job.submission.priority),
                cost_class=cost_class(job.parameters),
            )
            for job in new
        ]
        try:
            with self._engine.begin() as connection:
                # First, so that a repeated request is known as such also by a key that has used up its day.
                connection.execute(sa.insert(jobs), rows)
                self._use_quota(connection, new)
                send(connection, Signal(self._owner, queue=True))
        except sa.exc.IntegrityError:
            asked = [job.submission for job in new]
            existing = [self.find_request(one.request_id, request_hash, one.key_id) for one in asked if one.request_id]
            kept = [job for job in existing if job is not None]
            if len(kept) < len(new):
                raise
            return kept
        return list(new)

    def find_request(self, request_id: str, request_hash: str, key_id: str = "") -> Job | None:
        """The job that a key made for a request_id; None if there is none.

        Raises:
            AlreadyExists: it was made with other parameters.
        """
        row = self._row(jobs.c.key_id == key_id, jobs.c.request_id == request_id)
        if row is None:
            return None
        if row["request_hash"] != request_hash:
            raise AlreadyExists(
                f"request_id {request_id!r} was used for {row['id']} with other parameters; choose a new request_id"
            )
        return job_of(row)

    def get(self, job_id: str) -> Job:
        """The job of this id.

        Raises:
            NotFound: there is none.
        """
        row = self._row(jobs.c.id == job_id)
        if row is None:
            raise no_such_job(job_id)
        return job_of(row)

    def page(self, *, page_size: int, page_token: str = "", wanted: JobFilter | None = None) -> JobPage:
        """A page of jobs. Jobs with long texts make it shorter than `page_size`.

        Raises:
            InvalidRequest: a page token that is not from this list.
        """
        with self._engine.connect() as connection:
            return read_page(connection, page_size=page_size, page_token=page_token, wanted=wanted or JobFilter())

    def count_by_state(self, key_id: str | None = None) -> dict[JobState, int]:
        """Number of jobs in every state, of one key or of all."""
        query = sa.select(jobs.c.state, sa.func.count().label("number")).group_by(jobs.c.state)
        if key_id is not None:
            query = query.where(jobs.c.key_id == key_id)
        with self._engine.connect() as connection:
            counts: dict[str, int] = {row.state: row.number for row in connection.execute(query)}
        return {state: counts.get(state.value, 0) for state in JobState}

    def begin(self, job_id: str, now_s: float, setback: Setback | None = None) -> Job | None:
        """Count one more attempt of a job of this gateway and set RUNNING, nothing done yet.

        Args:
            job_id: of the job.
            now_s: Unix seconds.
            setback: why it begins again; kept in the job.

        Returns:
            None if the job has ended, is gone, or is not this gateway's.
        """
        values: dict[str, Any] = {
            "state": JobState.RUNNING.value,
            "attempts": jobs.c.attempts + 1,
            "start_time_s": sa.func.coalesce(jobs.c.start_time_s, now_s),
            **columns_of(Progress()),
        }
        with self._engine.begin() as connection:
            if setback is not None:
                noted = connection.execute(sa.select(jobs.c.setbacks).where(jobs.c.id == job_id)).scalar_one_or_none()
                values["setbacks"] = with_setback(noted or [], setback)
            return change(connection, self._owner, job_id, self._mine, values)

    def save(self, job_id: str, progress: Progress, stage_seconds: Mapping[str, float]) -> Job | None:
        """Keep how far a job of this gateway is and how long its finished stages took; None as from `begin`."""
        values = columns_of(progress) | {"stage_seconds": dict(stage_seconds)}
        with self._engine.begin() as connection:
            return change(connection, self._owner, job_id, self._mine, values, told=progress)

    def signal(self, job_id: str, progress: Progress) -> None:
        """Tell other replicas how far a job of this gateway is, without keeping it."""
        with self._engine.begin() as connection:
            send(connection, Signal(self._owner, job_id, progress))

    def finish(
        self, job_id: str, ending: Ending, now_s: float, progress: Progress | None = None, num_bytes: int = 0
    ) -> Job | None:
        """Write the terminal state, unless there is one already: the first stands.

        Any gateway may write that a job is cancelled; other endings are the owner's to write.

        Args:
            job_id: of the job.
            ending: the state and what belongs to it.
            now_s: Unix seconds.
            progress: how far a job that is not completed came; as kept before, if None.
            num_bytes: of all its files.

        Returns:
            The ended job, or None if this write came too late, or the job is gone or another gateway's.
        """
        values: dict[str, Any] = {"end_time_s": now_s, "num_bytes": num_bytes, **ending_columns(ending)}
        if ending.video is not None:
            progress = Progress(JobStage.DONE)
        if progress is not None:
            values |= columns_of(progress)
        whose = sa.true() if ending.state is JobState.CANCELLED else self._mine
        with self._engine.begin() as connection:
            return change(connection, self._owner, job_id, whose, values)

    def delete(self, job_id: str) -> None:
        """Forget an ended job. Deleting it again is no error.

        Raises:
            FailedPrecondition: it has not ended.
        """
        with self._engine.begin() as connection:
            ended = jobs.c.state.not_in(_UNFINISHED)
            gone = connection.execute(sa.delete(jobs).where(jobs.c.id == job_id, ended)).rowcount
        if not gone and (row := self._row(jobs.c.id == job_id)) is not None:
            raise FailedPrecondition(f"{job_id} is {row['state']}; cancel it before deleting it")

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        return jobs.c.owner == self._owner

    def _row(self, *conditions: sa.ColumnElement[bool]) -> sa.RowMapping | None:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(jobs).where(*conditions)).mappings().one_or_none()

    def _use_quota(self, connection: sa.Connection, new: Sequence[Job]) -> None:
        """Count new jobs of a key.

        Raises:
            QuotaExceeded: there would be more than the key may make in a day.
        """
        key_id, now_s = new[0].submission.key_id, new[0].create_time_s
        if not key_id:
            return
        day = admission.day_of(now_s)
        upsert(connection, key_id)
        same_day = sa.case((key_usage.c.day == day, key_usage.c.created), else_=0)
        created = connection.execute(
            sa.update(key_usage)
            .where(key_usage.c.key_id == key_id)
            .values(created=same_day + len(new), day=day)
            .returning(key_usage.c.created)
        ).scalar_one()
        most = self._limits.of(key_id).max_daily_jobs
        if most is not None and created > most:
            wait_s = admission.seconds_to_next_day(now_s)
            what = f"got {len(new)} more jobs after {created - len(new)}, allowed is {most} a day with this API key"
            raise QuotaExceeded(f"{what}; the next day (UTC) begins in {wait_s:.0f} s", f"key:{key_id}", wait_s)


def upsert(connection: sa.Connection, key_id: str) -> None:
    """Make the row of a key's use if it is not there."""
    values = {"key_id": key_id, "day": 0, "created": 0, "served_time_s": 0.0}
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert(key_usage).values(values).on_conflict_do_nothing())


def change(
    connection: sa.Connection,
    sender: str,
    job_id: str,
    whose: sa.ColumnElement[bool],
    values: Mapping[str, Any],
    told: Progress | None = None,
) -> Job | None:
    """Compare-and-set: changes the row only while the job has not ended and `whose` holds; other replicas are told.

    Returns:
        The job after the change; None if nothing was changed.
    """
    statement = (
        sa.update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(_UNFINISHED), whose)
        .values(dict(values))
        .returning(*jobs.c)
    )
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        return None
    send(connection, Signal(sender, job_id, told))
    return job_of(row)


def columns_of(progress: Progress) -> dict[str, Any]:
    """The columns of how far a job is."""
    return {"stage": progress.stage.value, "done": progress.done, "total": progress.total}


def ending_columns(ending: Ending) -> dict[str, Any]:
    """The columns of how a job ended, its time apart."""
    values: dict[str, Any] = {"state": ending.state.value, "owner": ""}
    if ending.failure is not None:
        values |= {"error_code": ending.failure.code, "error_message": ending.failure.message}
    if ending.video is not None:
        values["video"] = ending.video.to_json()
    return values


def with_setback(noted: Sequence[Any], setback: Setback) -> list[Any]:
    """The column of setbacks with one more."""
    return [*noted, setback.to_json()][-MAX_SETBACKS:]
