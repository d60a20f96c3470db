"""Everything of a gateway that has to do with jobs, put together: table, queue, pipeline, lease, signals."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from services.gateway.artifacts import Artifacts
from services.gateway.config import PipelineOptions
from services.gateway.database import DATABASE_FILE, CannotStart, open_database, open_postgres
from services.gateway.disk import DatabaseAway, database_away_is_said, disk_full_is_said
from services.gateway.jobs.admission import Limits
from services.gateway.jobs.leases import Lease
from services.gateway.jobs.listener import Listener
from services.gateway.jobs.queue import JobQueue
from services.gateway.jobs.store import JobStore
from services.gateway.jobs.tracker import JobTracker
from services.gateway.metrics import GatewayMetrics
from services.gateway.migrations import migrate
from services.gateway.pipeline.giving_way import GivingWay
from services.gateway.pipeline.keeper import Keeper
from services.gateway.pipeline.pipeline import Pipeline, Work
from services.gateway.pipeline.workflows import Workflows
from shared.errors import DiskFull
from shared.logging import get_logger

log = get_logger(__name__)

_RETRY_S = 1.0


def new_executor_id() -> str:
    """A name for this start of this process; no other gateway ever has it."""
    return f"{socket.gethostname()[:40]}-{secrets.token_hex(6)}"


class JobSide:
    """The jobs of one gateway."""

    def __init__(
        self, data_dir: Path, url: sa.URL | None, limits: Limits, metrics: GatewayMetrics, options: PipelineOptions
    ) -> None:
        """
        Args:
            data_dir: has the database file where there is no `url`.
            url: of PostgreSQL, which other gateways may share; None: the file, which has one gateway.
            limits: of API keys.
            metrics: of the gateway.
            options: how jobs are worked on.
        """
        self.executor_id = new_executor_id()
        self.database = open_postgres(url) if url is not None else open_database(data_dir / DATABASE_FILE)
        self._url = url
        self._options = options
        self._name = str(url) if url is not None else str(data_dir / DATABASE_FILE)
        shared = url is not None
        self.queue = JobQueue(self.database, self.executor_id, limits, shared=shared)
        self.tracker = JobTracker(JobStore(self.database, self.executor_id, limits), metrics, shared=shared)
        self._lease = Lease(self.database, self.executor_id, options.lease_s) if shared else None
        self._workflows = Workflows(self.database, self.executor_id)

    def build(self, work: Work, artifacts: Artifacts) -> Pipeline:
        """The pipeline over some stages; called once, before `start`."""
        may_work: Callable[[], bool] = self._may_work
        given = (self._workflows, self.queue, self.tracker, work, artifacts, self._options)
        self._pipeline = Pipeline(*given, may_work, self._num_gateways)
        self._keeper = Keeper(
            self.queue, self.tracker, self._pipeline, self._workflows, self._lease, self._options.retention
        )
        self._giving_way = GivingWay(self.queue, self.tracker, self._pipeline, work)
        hear = self._keeper.hear
        self._listener = Listener(self._url, self.executor_id, hear) if self._url is not None else None
        return self._pipeline

    async def start(self) -> None:
        """Bring the tables up to date and begin to work.

        Raises:
            CannotStart: the database is not one that this version can use, or there is no space for it.
        """
        try:
            with disk_full_is_said():
                await self._start()
        except DiskFull as error:
            raise CannotStart(f"{self._name}: {error.message}") from None

    async def _start(self) -> None:
        await self._migrate()
        await self._keeper.start()
        await self._pipeline.launch()
        if self._options.give_way:
            self._giving_way.start()
        if self._listener is not None:
            self._listener.start()

    async def close(self) -> None:
        """Stop working; unfinished jobs go on elsewhere, or here at the next start."""
        if self._listener is not None:
            await self._listener.stop()
        await self._giving_way.stop()
        await self._keeper.stop()
        await self._pipeline.close()
        await self._keeper.end_lease()
        self.tracker.close()
        self.database.dispose()

    def _may_work(self) -> bool:
        return self._lease is None or self._lease.valid

    def _num_gateways(self) -> int:
        return 1 if self._lease is None else self._lease.num_live

    async def _migrate(self) -> None:
        while True:
            try:
                if self._url is not None:
                    with database_away_is_said():
                        await asyncio.to_thread(migrate, self.database)
                else:
                    with disk_full_is_said():
                        await asyncio.to_thread(migrate, self.database)
                return
            except DatabaseAway as error:
                log.warning("waiting for the database", database=self._name, reason=error.message)
                await asyncio.sleep(_RETRY_S)
            except sa.exc.DatabaseError as error:
                what = f"{self._name} cannot be used ({error.orig})"
                raise CannotStart(f"{what}; move it away or put a backup in its place") from None
