"""The jobs table's operations. Synchronous and thread-safe; each is one transaction.

The table lives in the same file as the workflow engine's tables: one backup, one lock, one fsync policy hold for both,
and a copy of the file can never know a job's outcome without its workflow. Transactions are not shared between the
two, so every write here is idempotent or a compare-and-set, and the pipeline reconciles the two after a crash.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.gateway.jobs.domain import UNFINISHED, Ending, Job, JobStage, JobState, Progress
from services.gateway.jobs.schema import job_of, jobs, metadata, row_of
from shared.errors import AlreadyExists, FailedPrecondition, InvalidRequest, NotFound

_UNFINISHED = [state.value for state in UNFINISHED]
_PAGE_BYTES = 3 << 20
"""Of a page, about: an answer stays below gRPC's 4 MiB however long the prompts are."""
_JOB_BYTES = 2048
"""Most that a job takes on the wire beside the texts of its request."""
_LARGEST_SEQ = 2**63 - 1
"""Of a database's integer column."""


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and where the next page begins (empty: nowhere)."""

    jobs: tuple[Job, ...]
    next_page_token: str


class JobStore:
    """Jobs in a database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create_tables(self) -> None:
        """Make the table if it is not there."""
        metadata.create_all(self._engine)

    def create(self, job: Job, request_hash: str) -> Job:
        """Keep a new job; with a request_id seen before, the job kept then.

        Raises:
            AlreadyExists: the request_id was used with other parameters.
        """
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(jobs).values(row_of(job, request_hash)))
        except sa.exc.IntegrityError:
            existing = self.find_request(job.request_id, request_hash) if job.request_id else None
            if existing is None:
                raise
            return existing
        return job

    def find_request(self, request_id: str, request_hash: str) -> Job | None:
        """The job made for a request_id; None if there is none.

        Raises:
            AlreadyExists: it was made with other parameters.
        """
        row = self._row(jobs.c.request_id == request_id)
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
            raise NotFound(f"there is no job {job_id[:64]!r}; ListJobs shows what there is")
        return job_of(row)

    def page(self, *, page_size: int, page_token: str, states: Collection[JobState]) -> JobPage:
        """A page of jobs, newest first; no states means all. Jobs with long texts make it shorter than `page_size`.

        Raises:
            InvalidRequest: a page token that is not from this list.
        """
        names = sorted(state.value for state in states)
        query = sa.select(jobs).order_by(jobs.c.seq.desc()).limit(page_size + 1)
        if names:
            query = query.where(jobs.c.state.in_(names))
        if page_token:
            query = query.where(jobs.c.seq < _read_token(page_token, names))
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        page = _fitting([job_of(row) for row in rows[:page_size]])
        token = _make_token(rows[len(page) - 1]["seq"], names) if len(rows) > len(page) else ""
        return JobPage(tuple(page), token)

    def unfinished_ids(self) -> list[str]:
        """Ids of all queued and running jobs, oldest first."""
        query = sa.select(jobs.c.id).where(jobs.c.state.in_(_UNFINISHED)).order_by(jobs.c.seq)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def count_by_state(self) -> dict[JobState, int]:
        """Number of jobs in every state."""
        query = sa.select(jobs.c.state, sa.func.count().label("number")).group_by(jobs.c.state)
        with self._engine.connect() as connection:
            counts: dict[str, int] = {row.state: row.number for row in connection.execute(query)}
        return {state: counts.get(state.value, 0) for state in JobState}

    def begin(self, job_id: str, now_s: float) -> Job | None:
        """Count one more attempt and set RUNNING, nothing done yet; None if the job has ended or is gone."""
        return self._change(
            job_id,
            state=JobState.RUNNING.value,
            attempts=jobs.c.attempts + 1,
            **_columns(Progress()),
            start_time_s=sa.func.coalesce(jobs.c.start_time_s, now_s),
        )

    def save(self, job_id: str, progress: Progress, stage_seconds: Mapping[str, float]) -> Job | None:
        """Keep how far an unfinished job is and how long its finished stages took; None if it has ended or is gone."""
        return self._change(job_id, **_columns(progress), stage_seconds=dict(stage_seconds))

    def finish(self, job_id: str, ending: Ending, now_s: float, progress: Progress | None = None) -> Job | None:
        """Write the terminal state, unless there is one already: the first stands.

        Args:
            job_id: of the job.
            ending: the state and what belongs to it.
            now_s: Unix seconds.
            progress: how far a job that is not completed came; as kept before, if None.

        Returns:
            The ended job, or None if this write came too late or the job is gone.
        """
        values: dict[str, Any] = {"state": ending.state.value, "end_time_s": now_s}
        if ending.video is not None:
            progress = Progress(JobStage.DONE)
        if progress is not None:
            values |= _columns(progress)
        if ending.failure is not None:
            values |= {"error_code": ending.failure.code, "error_message": ending.failure.message}
        if ending.video is not None:
            values["video"] = ending.video.to_json()
        return self._change(job_id, **values)

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

    def _change(self, job_id: str, **values: Any) -> Job | None:
        """Compare-and-set: changes the row only while the job has not ended."""
        statement = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(_UNFINISHED)).values(values)
        with self._engine.begin() as connection:
            row = connection.execute(statement.returning(*jobs.c)).mappings().one_or_none()
        return job_of(row) if row is not None else None

    def _row(self, condition: sa.ColumnElement[bool]) -> sa.RowMapping | None:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(jobs).where(condition)).mappings().one_or_none()


def _fitting(listed: list[Job]) -> list[Job]:
    """As many of the first jobs as an answer can hold, at least one."""
    total = 0
    for number, job in enumerate(listed):
        wanted, failure = job.parameters, job.failure
        texts = [wanted.prompt, wanted.video_negative_prompt, wanted.audio_negative_prompt]
        if failure is not None:
            texts.append(failure.message)
        total += _JOB_BYTES + sum(len(text.encode()) for text in texts)
        if number and total > _PAGE_BYTES:
            return listed[:number]
    return listed


def _columns(progress: Progress) -> dict[str, Any]:
    return {"stage": progress.stage.value, "done": progress.done, "total": progress.total}


def _make_token(seq: int, states: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([seq, _digest(states)]).encode()).decode()


def _read_token(token: str, states: list[str]) -> int:
    try:
        seq, digest = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        if type(seq) is int and 0 < seq <= _LARGEST_SEQ and digest == _digest(states):
            return seq
    except (ValueError, TypeError, RecursionError, binascii.Error):
        pass
    what = f"got {token[:64]!r}, allowed is next_page_token of an answer with the same states, or nothing"
    raise InvalidRequest.of("page_token", what)


def _digest(states: list[str]) -> str:
    return hashlib.sha256(",".join(states).encode()).hexdigest()[:8]
