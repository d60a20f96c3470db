"""That a gateway is alive, as the others see it: a row with a time, by the database's clock.

A gateway takes up work only while its lease lasts, and stops all work when it could not renew it in time: another one
may have been given its jobs. On SQLite no leases are needed: the lock of the data folder says that all others are gone.
"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from services.gateway.jobs.schema import leases

_RENEWALS = 3
"""In the time of a lease."""
_MARGIN = 0.15
"""Part of the lease by which it counts as lost on this side before its end: stopping takes a moment."""
_FORGET_S = 3600.0


def database_now(connection: sa.Connection) -> sa.ColumnElement[Any]:
    """Unix seconds by the database's clock, as an expression."""
    if connection.dialect.name == "postgresql":
        return sa.func.extract("epoch", sa.func.clock_timestamp())
    return sa.literal_column("(julianday('now') - 2440587.5) * 86400.0")


class Lease:
    """The lease of one gateway. Synchronous; `valid` may be asked from anywhere."""

    def __init__(self, engine: sa.Engine, executor_id: str, lease_s: float) -> None:
        """
        Args:
            engine: of a database that was migrated.
            executor_id: of this gateway.
            lease_s: how long others wait for a sign of life before they take its jobs.
        """
        self._engine = engine
        self._executor_id = executor_id
        self._lease_s = lease_s
        self.renew_s = lease_s / _RENEWALS
        """Between two renewals."""
        self._until_s = float("-inf")
        self.num_live = 1
        """Gateways whose lease had not ended when this one was renewed, this one among them."""

    def renew(self) -> None:
        """Take or prolong it; leases that ended long ago are forgotten.

        Raises:
            sqlalchemy.exc.DatabaseError: the database cannot be reached.
        """
        asked_s = time.monotonic()
        with self._engine.begin() as connection:
            now = database_now(connection)
            mine = leases.c.executor_id == self._executor_id
            if not connection.execute(sa.update(leases).where(mine).values(until_s=now + self._lease_s)).rowcount:
                row = {"executor_id": self._executor_id, "until_s": now + self._lease_s}
                connection.execute(sa.insert(leases).values(row))
            connection.execute(sa.delete(leases).where(leases.c.until_s < now - _FORGET_S))
            live = sa.select(sa.func.count()).select_from(leases).where(leases.c.until_s > now)
            self.num_live = max(1, connection.execute(live).scalar_one())
        # Counted from before the question: the database's time began later, so it ends later.
        self._until_s = asked_s + self._lease_s

    def known(self) -> set[str]:
        """Executor ids of all gateways that live, or may come back: their lease has not ended long ago."""
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(leases.c.executor_id)).scalars())

    def end(self) -> None:
        """Give it up: others may take this gateway's jobs at once."""
        self._until_s = float("-inf")
        with self._engine.begin() as connection:
            connection.execute(sa.delete(leases).where(leases.c.executor_id == self._executor_id))

    @property
    def valid(self) -> bool:
        """Whether nobody can have taken this gateway's jobs away; the clock of a stopped process goes on."""
        return time.monotonic() < self._until_s - _MARGIN * self._lease_s
