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
    conditions = _conditions(wanted)
    starts = []
    if wanted.after_id:
        starts.append(_seq_of(connection, wanted.after_id))
    if page_token:
        starts.append(_read_token(page_token, wanted))
    if starts:
        start = max(starts) if wanted.oldest_first else min(starts)
        conditions.append(jobs.c.seq > start if wanted.oldest_first else jobs.c.seq < start)
    order = jobs.c.seq.asc() if wanted.oldest_first else jobs.c.seq.desc()
    query = sa.select(jobs).order_by(order).limit(page_size + 1)
    if wanted.states:
        # Each part is a range of an index; all states at once would be sorted as a whole.
        parts = [
            sa.select(jobs.c.seq)
            .where(jobs.c.state == state.value, *conditions)
            .order_by(order)
            .limit(page_size + 1)
            .subquery()
            for state in sorted(wanted.states, key=lambda state: state.value)
        ]
        query = query.where(jobs.c.seq.in_(sa.union_all(*(sa.select(part.c.seq) for part in parts))))
    else:
        query = query.where(*conditions)
    rows = connection.execute(query).mappings().all()
    page = _fitting([job_of(row) for row in rows[:page_size]])
    token = _make_token(rows[len(page) - 1]["seq"], wanted) if len(rows) > len(page) else ""
    return JobPage(tuple(page), token)


def _conditions(wanted: JobFilter) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.key_id is not None:
        conditions.append(jobs.c.key_id == wanted.key_id)
    if wanted.batch_id:
        conditions += [has_batch, jobs.c.batch_id == wanted.batch_id]
    if wanted.label:
        conditions += [has_label, jobs.c.label == wanted.label]
    return conditions


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
