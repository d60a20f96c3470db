"""Pages of the jobs table: keyset paging that stays quick however many jobs there are."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from services.gateway.jobs.domain import Job, JobState
from services.gateway.jobs.schema import has_batch, has_label, job_of, jobs
from shared.errors import InvalidRequest

_PAGE_BYTES = 3 << 20
"""Of a page, about: an answer stays below gRPC's 4 MiB however long the prompts are."""
_JOB_BYTES = 2048
"""Most that a job takes on the wire beside the texts of its request."""
_LARGEST_SEQ = 2**63 - 1
"""Of a database's integer column."""


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list has, and in which order."""

    states: frozenset[JobState] = field(default_factory=frozenset)
    """None means all."""
    key_id: str | None = None
    """Of the key that made them; None means everybody's, "" those made without a key."""
    batch_id: str = ""
    """Empty means any."""
    label: str = ""
    """Empty means any."""
    oldest_first: bool = False
    after_id: str = ""
    """Only jobs behind this one in the order; empty means from the beginning."""


@dataclass(frozen=True)
class JobPage:
    """Some jobs in the order of their list, and where the next page begins (empty: nowhere)."""

    jobs: tuple[Job, ...]
    next_page_token: str


def read_page(connection: sa.Connection, *, page_size: int, page_token: str, wanted: JobFilter) -> JobPage:
    """A page. Jobs with long texts make it shorter than `page_size`.

    Raises:
        InvalidRequest: a page token that is not from this list, or an `after_id` of no job.
    """
    first, last = _span(connection, page_token, wanted)
    reading = _Reading(wanted, first, last, page_size + 1, weighs=connection.dialect.name == "postgresql")
    rows = connection.execute(reading.query()).mappings().all()
    page = _fitting([job_of(row) for row in rows[:page_size]])
    token = _make_token(rows[len(page) - 1]["seq"], wanted) if len(rows) > len(page) else ""
    return JobPage(tuple(page), token)


@dataclass(frozen=True)
class _Reading:
    """How the first rows of a list are read: from an index that ends with seq, as one range of it, or one a state."""

    wanted: JobFilter
    first: int
    last: int
    """Only rows with a seq between these two."""
    limit: int
    weighs: bool
    """The planner weighs what it holds to be many rows. SQLite's goes by what is compared alone."""

    def query(self) -> sa.Select[Any]:
        """The rows in their order, all columns."""
        wanted = self.wanted
        if wanted.batch_id:
            # A batch has an end: its index needs no other columns.
            of_batch = self._range(sa.select(jobs), [(jobs.c.batch_id, wanted.batch_id)])
            return of_batch.where(has_batch, *self._beside_index())
        named = [(jobs.c.label, wanted.label)] if wanted.label else []
        named += [(jobs.c.key_id, wanted.key_id)] if wanted.key_id is not None else []
        ranges = [[*named, (jobs.c.state, state.value)] for state in JobState if state in wanted.states] or [named]
        if len(ranges) == 1:
            return self._range(sa.select(jobs), ranges[0])
        parts = [self._range(sa.select(jobs.c.seq), each).subquery() for each in ranges]
        among = jobs.c.seq.in_(sa.union_all(*(sa.select(part.c.seq) for part in parts)))
        return sa.select(jobs).where(among).order_by(self._directed(jobs.c.seq)).limit(self.limit)

    def _range(self, query: sa.Select[Any], named: Sequence[tuple[sa.Column[str], str]]) -> sa.Select[Any]:
        columns = [*(column for column, _ in named), jobs.c.seq]
        if self.weighs:
            # Told that a column has one value, it may look through all jobs in the order of seq for those that have it,
            # which is long where they are at the other end. Compared as a whole, only the index has this order.
            values = [value for _, value in named]
            first, last = (sa.tuple_(*map(sa.literal, [*values, seq])) for seq in (self.first, self.last))
            query = query.where(sa.tuple_(*columns) > first, sa.tuple_(*columns) < last)
        else:
            query = query.where(*(column == value for column, value in named))
            query = query.where(jobs.c.seq > self.first, jobs.c.seq < self.last)
        if self.wanted.label and not self.wanted.batch_id:
            query = query.where(has_label)
        return query.order_by(*map(self._directed, columns)).limit(self.limit)

    def _beside_index(self) -> list[sa.ColumnElement[bool]]:
        """Conditions beside that of a batch, in forms for which no other index is of use."""
        wanted = self.wanted
        conditions: list[sa.ColumnElement[bool]] = []
        if wanted.states:
            conditions.append(jobs.c.state.not_in([state.value for state in JobState if state not in wanted.states]))
        for column, value in ((jobs.c.key_id, wanted.key_id), (jobs.c.label, wanted.label or None)):
            if value is not None:
                conditions.append(column + "" == value)
        return conditions

    def _directed(self, column: sa.Column[Any]) -> sa.UnaryExpression[Any]:
        return column.asc() if self.wanted.oldest_first else column.desc()


def _span(connection: sa.Connection, page_token: str, wanted: JobFilter) -> tuple[int, int]:
    """Between which two seqs a page lies."""
    starts = [_seq_of(connection, wanted.after_id)] if wanted.after_id else []
    starts += [_read_token(page_token, wanted)] if page_token else []
    if wanted.oldest_first:
        return max(starts, default=0), _LARGEST_SEQ
    return 0, min(starts, default=_LARGEST_SEQ)


def _seq_of(connection: sa.Connection, job_id: str) -> int:
    seq = connection.execute(sa.select(jobs.c.seq).where(jobs.c.id == job_id)).scalar_one_or_none()
    if seq is None:
        raise InvalidRequest.of("after", f"got {job_id[:64]!r}, allowed is the id of a job that is there, or nothing")
    return int(seq)


def _fitting(listed: list[Job]) -> list[Job]:
    """As many of the first jobs as an answer can hold, at least one."""
    total = 0
    for number, job in enumerate(listed):
        wanted, failure = job.parameters, job.failure
        texts = [wanted.prompt, wanted.video_negative_prompt, wanted.audio_negative_prompt, job.submission.label]
        texts += [setback.reason for setback in job.setbacks]
        if failure is not None:
            texts.append(failure.message)
        total += _JOB_BYTES + sum(len(text.encode()) for text in texts)
        if number and total > _PAGE_BYTES:
            return listed[:number]
    return listed


def _make_token(seq: int, wanted: JobFilter) -> str:
    return base64.urlsafe_b64encode(json.dumps([seq, _digest(wanted)]).encode()).decode()


def _read_token(token: str, wanted: JobFilter) -> int:
    try:
        seq, digest = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        if type(seq) is int and 0 < seq <= _LARGEST_SEQ and digest == _digest(wanted):
            return seq
    except (ValueError, TypeError, RecursionError, binascii.Error):
        pass
    what = f"got {token[:64]!r}, allowed is next_page_token of an answer to the same question, or nothing"
    raise InvalidRequest.of("page_token", what)


def _digest(wanted: JobFilter) -> str:
    states: Sequence[str] = sorted(state.value for state in wanted.states)
    asked: list[Any] = [states, wanted.key_id, wanted.batch_id, wanted.label, wanted.oldest_first, wanted.after_id]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
