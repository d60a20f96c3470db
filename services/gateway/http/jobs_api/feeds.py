"""A job's changes for many readers: one watch of the engine a job, each change written once, the last ones kept.

A reader whose connection broke goes on behind the last event it has seen, if it comes back within half a minute to the
same gateway; otherwise it begins with the present state. Each event holds the whole job, so nothing is lost either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from services.gateway.engine import GatewayEngine
from services.gateway.jobs.domain import Job
from shared.errors import OviError, Unavailable
from shared.logging import get_logger

log = get_logger(__name__)

HEARTBEAT_S = 15.0
"""Longest silence; proxies cut connections that say nothing."""
END_ID = "end"
"""Id of a job's last event: who has seen it need not come back."""
_KEPT_EVENTS = 256
_LINGER_S = 30.0
"""How long events are kept for readers that may come back."""
_RETRY_MS = 2000


class _Feed:
    """The events of one job."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(4)
        self.events: list[bytes] = []
        self.count = 0
        """Events so far; those that are kept are the last ones."""
        self.readers = 0
        self.changed = asyncio.Event()
        self.begun = asyncio.Event()
        self.over = False
        self.error: OviError | None = None
        self.pump: asyncio.Task[None] | None = None

    def push(self, event: bytes) -> None:
        self.count += 1
        self.events = [*self.events[1 - _KEPT_EVENTS :], event]
        self.wake()

    def wake(self) -> None:
        self.begun.set()
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, position: int) -> list[bytes]:
        missing = self.count - position
        return self.events[-missing:] if missing > 0 else []

    def position_of(self, last_event_id: str) -> int:
        """Behind which event to go on; before the newest one if the id is not of this feed."""
        token, _, number = last_event_id.partition("-")
        if token == self.token and number.isascii() and number.isdecimal() and int(number) <= self.count:
            return int(number)
        return max(0, self.count - 1)


class JobFeeds:
    """Feeds of the jobs that somebody reads."""

    def __init__(self, engine: GatewayEngine, show: Callable[[Job], str]) -> None:
        """
        Args:
            engine: is watched.
            show: a job as JSON in one line.
        """
        self._engine = engine
        self._show = show
        self._feeds: dict[str, _Feed] = {}

    async def open(self, job_id: str, last_event_id: str) -> AsyncIterator[bytes]:
        """Server-sent events of a job: its present state or what came after `last_event_id`, then every change.

        Raises:
            NotFound: there is no such job.
            Unavailable: the gateway is draining.
        """
        feed = self._feeds.get(job_id)
        if feed is None:
            feed = self._feeds[job_id] = _Feed()
            feed.pump = asyncio.create_task(self._pump(job_id, feed))
        feed.readers += 1
        try:
            await feed.begun.wait()
            if feed.error is not None:
                raise feed.error
        except BaseException:
            self._leave(job_id, feed)
            raise
        return self._read(job_id, feed, feed.position_of(last_event_id))

    async def _read(self, job_id: str, feed: _Feed, position: int) -> AsyncIterator[bytes]:
        try:
            while True:
                changed, unread = feed.changed, feed.after(position)
                position = feed.count
                for event in unread:
                    yield event
                if feed.count > position:
                    continue
                if feed.over:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
        finally:
            self._leave(job_id, feed)

    async def _pump(self, job_id: str, feed: _Feed) -> None:
        try:
            async with contextlib.aclosing(self._engine.watch(job_id)) as jobs:
                async for job in jobs:
                    event_id = END_ID if job.state.ended else f"{feed.token}-{feed.count + 1}"
                    feed.push(format_sse_event(data_str=self._show(job), event="job", id=event_id, retry=_RETRY_MS))
        except OviError as error:
            # Readers that have seen the job already are sent away, and come back when the gateway does.
            feed.error = error
            if not isinstance(error, Unavailable):
                log.info("a feed ended", job_id=job_id, reason=error.message)
        finally:
            feed.over = True
            feed.wake()

    def _leave(self, job_id: str, feed: _Feed) -> None:
        feed.readers -= 1
        if not feed.readers:
            linger_s = 0.0 if feed.error is not None else _LINGER_S
            asyncio.get_running_loop().call_later(linger_s, self._drop, job_id, feed)

    def _drop(self, job_id: str, feed: _Feed) -> None:
        if feed.readers or self._feeds.get(job_id) is not feed:
            return
        del self._feeds[job_id]
        if feed.pump is not None:
            feed.pump.cancel()
