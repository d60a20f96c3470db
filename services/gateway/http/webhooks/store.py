"""The table of webhooks: who is to be told of which job, and how far that is. Synchronous and thread-safe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.gateway.disk import database_away_is_said, disk_full_is_said
from services.gateway.jobs.schema import jobs, metadata

WAITING, DELIVERED, FAILED = "waiting", "delivered", "failed"

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("url", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    # When it is to be tried next; none while the job has not ended.
    sa.Column("next_time_s", sa.Float),
    sa.Column("last_error", sa.String),
)
_due = webhooks.c.next_time_s.is_not(None)
sa.Index("ix_webhooks_due", webhooks.c.next_time_s, sqlite_where=_due, postgresql_where=_due)


@dataclass(frozen=True)
class Webhook:
    """A call that is to be made."""

    job_id: str
    url: str
    attempts: int
    """Before this one."""


class WebhookStore:
    """Webhooks in a database. Every call raises DatabaseAway or DiskFull where the database cannot be used now."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with database_away_is_said(), disk_full_is_said(), self._engine.begin() as connection:
            yield connection

    def add(self, job_id: str, url: str) -> None:
        """Keep that a URL is to be told of the end of a job; the first one of a job stands."""
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        values = {"job_id": job_id, "url": url, "state": WAITING, "attempts": 0}
        with self._transaction() as connection:
            connection.execute(insert(webhooks).values(values).on_conflict_do_nothing())

    def wake_ended(self, now_s: float, job_id: str = "") -> int:
        """Make the webhooks of ended jobs due, or that of one of them; how many there were."""
        ended = sa.select(jobs.c.id).where(jobs.c.id == webhooks.c.job_id, jobs.c.end_time_s.is_not(None)).exists()
        statement = sa.update(webhooks).where(webhooks.c.state == WAITING, webhooks.c.next_time_s.is_(None), ended)
        if job_id:
            statement = statement.where(webhooks.c.job_id == job_id)
        with self._transaction() as connection:
            return connection.execute(statement.values(next_time_s=now_s)).rowcount

    def claim(self, now_s: float, lease_s: float, limit: int) -> list[Webhook]:
        """Take webhooks that are due; nobody else takes them before `lease_s` has passed."""
        query = sa.select(webhooks).where(_due, webhooks.c.next_time_s <= now_s).order_by(webhooks.c.next_time_s)
        taken = []
        with self._transaction() as connection:
            for row in connection.execute(query.limit(limit)).mappings().all():
                mine = (
                    sa.update(webhooks)
                    .where(webhooks.c.job_id == row["job_id"], webhooks.c.next_time_s == row["next_time_s"])
                    .values(next_time_s=now_s + lease_s, attempts=row["attempts"] + 1)
                )
                if connection.execute(mine).rowcount:
                    taken.append(Webhook(row["job_id"], row["url"], row["attempts"]))
        return taken

    def delivered(self, job_id: str) -> None:
        """A call has succeeded."""
        self._settle(job_id, state=DELIVERED, next_time_s=None, last_error=None)

    def failed(self, job_id: str, reason: str, next_time_s: float | None) -> None:
        """A call has failed; it is tried again at `next_time_s`, or never."""
        state = FAILED if next_time_s is None else WAITING
        self._settle(job_id, state=state, next_time_s=next_time_s, last_error=reason[:1000])

    def _settle(self, job_id: str, **values: object) -> None:
        with self._transaction() as connection:
            connection.execute(sa.update(webhooks).where(webhooks.c.job_id == job_id).values(values))
