"""The queue: which jobs wait, who takes them, and what becomes of those whose gateway is gone.

Every gateway on a database has one of these. Taking a job, and taking it away from a gateway that is gone, are each one
transaction that compares before it sets, so two gateways never have the same job. Synchronous and thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from services.gateway.config import Retention
from services.gateway.jobs.admission import KeyQueue, Limits, QueueSnapshot, next_head
from services.gateway.jobs.domain import Ending, Job, JobState, Progress, Setback
from services.gateway.jobs.leases import database_now
from services.gateway.jobs.schema import job_of, jobs, key_usage, leases
from services.gateway.jobs.signals import Signal, send
from services.gateway.jobs.store import change, columns_of, ending_columns, upsert, with_setback

MAX_OWNERS_LOST = 3
"""How often a job is taken up again after the gateway that worked on it was lost."""
_ADMISSION_LOCK = 0x6F76_6902
"""Of PostgreSQL's advisory locks; gateways take jobs one after the other, so limits of keys hold for all of them."""
_ROWS_AT_ONCE = 1000
_QUEUED = jobs.c.state == JobState.QUEUED.value
_RUNNING = jobs.c.state == JobState.RUNNING.value
_WAITING = (JobState.QUEUED, JobState.PAUSED)
_FREE = jobs.c.owner == ""


class JobQueue:
    """The queue as one gateway sees and uses it."""

    def __init__(self, engine: sa.Engine, owner: str, limits: Limits, *, shared: bool) -> None:
        """
        Args:
            engine: of a database that was migrated.
            owner: executor id of this gateway.
            limits: of API keys.
            shared: other gateways use the database too: a job is only taken while this one's lease lasts.
        """
        self._engine = engine
        self._owner = owner
        self._limits = limits
        self._shared = shared

    def claim(self, now_s: float) -> Job | None:
        """Take the next job: one that was begun and has lost its gateway, else the first of the queue.

        It is RUNNING and this gateway's from now on, with one more attempt counted; None if there is nothing to take.
        """
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADMISSION_LOCK)))
            self._expire(connection, now_s)
            job_id = self._next_id(connection, now_s)
            if job_id is None:
                return None
            values = {
                "state": JobState.RUNNING.value,
                "owner": self._owner,
                "attempts": jobs.c.attempts + 1,
                "start_time_s": sa.func.coalesce(jobs.c.start_time_s, now_s),
                **columns_of(Progress()),
            }
            free = sa.or_(jobs.c.state == JobState.QUEUED.value, sa.and_(_RUNNING, _FREE))
            job = change(connection, self._owner, job_id, sa.and_(free, self._leased(connection)), values)
            if job is not None:
                key_id = job.submission.key_id
                upsert(connection, key_id)
                served = sa.update(key_usage).where(key_usage.c.key_id == key_id).values(served_time_s=now_s)
                connection.execute(served)
            return job

    def head(self, now_s: float) -> Job | None:
        """What `claim` would take; None if there is nothing."""
        with self._engine.connect() as connection:
            job_id = self._next_id(connection, now_s)
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
            return job_of(row) if row is not None else None

    def release(self, job_ids: Sequence[str] | None = None) -> int:
        """Let go of running jobs of this gateway, or of all of them, so that any gateway can go on with them."""
        statement = sa.update(jobs).where(_RUNNING, jobs.c.owner == self._owner).values(owner="")
        if job_ids is not None:
            statement = statement.where(jobs.c.id.in_(job_ids))
        with self._engine.begin() as connection:
            released = connection.execute(statement).rowcount
            if released:
                send(connection, Signal(self._owner, queue=True))
        return released

    def pause(self, job_id: str) -> Job | None:
        """Set a job aside; None if it has ended or is gone. Who works on it finds that it is not theirs any more."""
        with self._engine.begin() as connection:
            return change(connection, self._owner, job_id, sa.true(), {"state": JobState.PAUSED.value, "owner": ""})

    def resume(self, job_id: str) -> Job | None:
        """Put a paused job back into the queue; None if it is not paused."""
        paused = jobs.c.state == JobState.PAUSED.value
        with self._engine.begin() as connection:
            job = change(connection, self._owner, job_id, paused, {"state": JobState.QUEUED.value})
            send(connection, Signal(self._owner, queue=True))
            return job

    def expire(self, now_s: float) -> list[str]:
        """Fail every job that waits and whose deadline has passed; their ids."""
        with self._engine.begin() as connection:
            return self._expire(connection, now_s)

    def take_from_lost(self, now_s: float) -> tuple[int, list[Job]]:
        """Free the running jobs of gateways whose lease has ended; one whose gateways were lost too often fails.

        Returns:
            How many were freed, and the jobs that failed.
        """
        # Owners are read before leases: one that has taken a lease since is then seen to be alive.
        with self._engine.connect() as connection:
            owners = set(connection.execute(sa.select(jobs.c.owner).where(_RUNNING).distinct()).scalars())
            live = set()
            if self._shared:
                alive = leases.c.until_s > database_now(connection)
                live = set(connection.execute(sa.select(leases.c.executor_id).where(alive)).scalars())
        lost = owners - live - {self._owner, ""}
        taken = [job for owner in sorted(lost) for job in self._take_from(owner, now_s)]
        failed = [job for job in taken if job.state.ended]
        return len(taken) - len(failed), failed

    def strays(self, job_ids: Collection[str]) -> set[str]:
        """Those of some jobs that are not, or no longer, running as this gateway's."""
        if not job_ids:
            return set()
        query = sa.select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), _RUNNING, jobs.c.owner == self._owner)
        with self._engine.connect() as connection:
            return set(job_ids) - set(connection.execute(query).scalars())

    def owned(self) -> list[Job]:
        """Running jobs of this gateway, oldest first."""
        query = sa.select(jobs).where(_RUNNING, jobs.c.owner == self._owner).order_by(jobs.c.seq)
        with self._engine.connect() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def running(self) -> list[Job]:
        """Running jobs of all gateways, oldest first."""
        query = sa.select(jobs).where(_RUNNING).order_by(jobs.c.seq)
        with self._engine.connect() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def snapshot(self) -> QueueSnapshot:
        """All jobs that wait."""
        columns = (jobs.c.key_id, jobs.c.rank, jobs.c.priority, jobs.c.cost_class)
        query = sa.select(*columns).where(_QUEUED).order_by(jobs.c.key_id, jobs.c.rank, jobs.c.seq)
        by_key: dict[str, list[tuple[float, int]]] = {}
        num_by_class: Counter[str] = Counter()
        with self._engine.connect() as connection:
            # In parts, between which others of this process get on.
            for part in connection.execute(query).partitions(_ROWS_AT_ONCE):
                for key_id, rank, priority, cost_class in part:
                    by_key.setdefault(key_id, []).append((rank, priority))
                    num_by_class[cost_class] += 1
        return QueueSnapshot(by_key, num_by_class)

    def completed_since(self, time_s: float, limit: int) -> list[tuple[str, dict[str, float], float]]:
        """Of the last jobs that were completed after a time: cost class, seconds of the stages, end; oldest first."""
        # Told by what it is not: the index of ends is to be used, of which little is new, and not that of states.
        completed = jobs.c.state.not_in([state.value for state in JobState if state is not JobState.COMPLETED])
        query = (
            sa.select(jobs.c.cost_class, jobs.c.stage_seconds, jobs.c.end_time_s)
            .where(jobs.c.end_time_s.is_not(None), jobs.c.end_time_s > time_s)
            .where(completed, jobs.c.cost_class != "")
            .order_by(jobs.c.end_time_s.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [(row.cost_class, row.stage_seconds, row.end_time_s) for row in connection.execute(query)][::-1]

    def outlived(self, retention: Retention, now_s: float, limit: int) -> list[str]:
        """Ended jobs that are not to be kept any longer, at most `limit`, those that ended first before others."""
        ended = jobs.c.end_time_s.is_not(None)
        oldest = sa.select(jobs.c.id).where(ended).order_by(jobs.c.end_time_s)
        with self._engine.connect() as connection:
            too_many = too_large = 0
            if retention.max_jobs or retention.max_bytes:
                number, size = connection.execute(
                    sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(jobs.c.num_bytes), 0)).where(ended)
                ).one()
                too_many = number - retention.max_jobs if retention.max_jobs else 0
                too_large = int(size) - retention.max_bytes if retention.max_bytes else 0
            ids: list[str] = []
            for job_id, end_time_s, num_bytes in connection.execute(
                oldest.add_columns(jobs.c.end_time_s, jobs.c.num_bytes).limit(limit)
            ):
                old = retention.max_age_s > 0 and end_time_s < now_s - retention.max_age_s
                if not old and len(ids) >= too_many and too_large <= 0:
                    break
                ids.append(job_id)
                too_large -= num_bytes
        return ids

    def _next_id(self, connection: sa.Connection, now_s: float) -> str | None:
        begun = sa.select(jobs.c.id).where(_RUNNING, _FREE).order_by(jobs.c.seq).limit(1)
        job_id: str | None = connection.execute(begun).scalar_one_or_none()
        if job_id is not None:
            return job_id
        head = next_head(self._heads(connection), self._limits, now_s)
        return head.head_id if head is not None else None

    def _heads(self, connection: sa.Connection) -> list[KeyQueue]:
        """The queue of every key that has jobs waiting; reads an index by one step a key."""
        keys = sa.select(sa.func.min(jobs.c.key_id).label("key_id")).where(_QUEUED).cte("keys", recursive=True)
        following = sa.select(sa.func.min(jobs.c.key_id)).where(_QUEUED, jobs.c.key_id > keys.c.key_id)
        keys = keys.union_all(sa.select(following.scalar_subquery()).where(keys.c.key_id.is_not(None)))
        first = (
            sa.select(jobs.c.seq)
            .where(_QUEUED, jobs.c.key_id == keys.c.key_id)
            .order_by(jobs.c.rank, jobs.c.seq)
            .limit(1)
            .scalar_subquery()
        )
        heads = sa.select(first.label("seq")).where(keys.c.key_id.is_not(None)).subquery()
        query = (
            sa.select(jobs.c.key_id, jobs.c.id, jobs.c.priority, jobs.c.create_time_s, key_usage.c.served_time_s)
            .join(heads, jobs.c.seq == heads.c.seq)
            .outerjoin(key_usage, key_usage.c.key_id == jobs.c.key_id)
        )
        by_key = sa.select(jobs.c.key_id, sa.func.count().label("number")).where(_RUNNING).group_by(jobs.c.key_id)
        running: dict[str, int] = {row.key_id: row.number for row in connection.execute(by_key)}
        return [
            KeyQueue(key_id, job_id, priority, create_time_s, running.get(key_id, 0), served_time_s or 0.0)
            for key_id, job_id, priority, create_time_s, served_time_s in connection.execute(query)
        ]

    def _leased(self, connection: sa.Connection) -> sa.ColumnElement[bool]:
        """That this gateway is known to be alive: nobody takes its jobs away."""
        if not self._shared:
            return sa.true()
        return sa.exists().where(leases.c.executor_id == self._owner, leases.c.until_s > database_now(connection))

    def _expire(self, connection: sa.Connection, now_s: float) -> list[str]:
        # Told by what it is not: the index of deadlines is to be used, which is short, and not that of states.
        waits = jobs.c.state.not_in([state.value for state in JobState if state not in _WAITING])
        # One that was begun has met its deadline.
        late = sa.and_(jobs.c.deadline_time_s.is_not(None), jobs.c.deadline_time_s <= now_s)
        what = (
            "the deadline passed before it was this job's turn; create it again with a later one, or a higher priority"
        )
        values = {"end_time_s": now_s, **ending_columns(Ending.failed("DEADLINE_EXCEEDED", what))}
        statement = sa.update(jobs).where(late, waits, jobs.c.attempts == 0).values(values).returning(jobs.c.id)
        expired = list(connection.execute(statement).scalars())
        for job_id in expired:
            send(connection, Signal(self._owner, job_id))
        return expired

    def _take_from(self, owner: str, now_s: float) -> list[Job]:
        lost = sa.and_(_RUNNING, jobs.c.owner == owner)
        taken = []
        with self._engine.begin() as connection:
            if self._shared:
                alive = sa.select(leases.c.until_s).where(
                    leases.c.executor_id == owner, leases.c.until_s > database_now(connection)
                )
                if connection.execute(alive).first() is not None:
                    return []
            query = sa.select(jobs.c.id, jobs.c.owners_lost, jobs.c.setbacks).where(lost)
            for job_id, before, setbacks in connection.execute(query).all():
                setback = Setback(now_s, f"the gateway {owner} was lost while it worked on this job")
                noted = with_setback(setbacks, setback)
                values: dict[str, Any] = {"owner": "", "owners_lost": before + 1, "setbacks": noted}
                if before >= MAX_OWNERS_LOST:
                    what = f"the gateway was stopped {before + 1} times while it worked on this job"
                    ending = Ending.failed("ABORTED", f"{what}; create the job again if it should run")
                    values |= {"end_time_s": now_s, **ending_columns(ending)}
                job = change(connection, self._owner, job_id, lost, values)
                if job is not None:
                    taken.append(job)
            send(connection, Signal(self._owner, queue=True))
        return taken
