"""The only writer of what becomes of jobs: to the table, and to everybody who watches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ParamSpec, TypeVar

from services.gateway.disk import DatabaseAway, database_away_is_said, disk_full_is_said
from services.gateway.jobs.domain import Ending, Job, JobStage, JobState, Progress, Setback
from services.gateway.jobs.listing import JobFilter, JobPage
from services.gateway.jobs.signals import Signal
from services.gateway.jobs.store import JobStore
from services.gateway.metrics import GatewayMetrics
from shared.errors import DiskFull, NotFound, Unavailable
from shared.logging import get_logger

P = ParamSpec("P")
R = TypeVar("R")

log = get_logger(__name__)

_SAVE_INTERVAL_S = 1.0
_SIGNAL_INTERVAL_S = 0.25
"""Between two words to other replicas of how far a job is."""
_RETRY_S = 1.0
_MAX_UNREAD = 256
"""Changes kept for a watcher that does not read; the oldest go first, and each is a whole job, so none is missed."""
_MAX_UNREAD_OF_ALL = 16_384
"""The same for a reader of all jobs, who must keep up: of a job that ends, the end can be among what goes."""


class _Watcher:
    """One reader of one job's changes, or of all jobs'."""

    def __init__(self, max_unread: int = _MAX_UNREAD) -> None:
        self.unread: deque[Job] = deque(maxlen=max_unread)
        self.changed = asyncio.Event()
        self.latest: Job | None = None
        """What it was told last."""

    def tell(self, job: Job) -> None:
        self.latest = job
        self.unread.append(job)
        self.changed.set()


def _is_behind(job: Job, told: Job | None) -> bool:
    """Whether the table is not as far yet as what was told already of the same attempt."""
    if told is None or (job.state, job.attempts) != (told.state, told.attempts):
        return False
    return job.progress.fraction < told.progress.fraction


def _nothing(job_id: str) -> None:
    """Nobody wants to know."""


class JobTracker:
    """Jobs as they are now: the table, and on top of it the progress that is not written yet.

    State changes are serialised by a lock, so that watchers see them in the order in which the table took them.
    """

    def __init__(self, store: JobStore, metrics: GatewayMetrics, *, shared: bool = False) -> None:
        """
        Args:
            store: the table.
            metrics: counts ends and stages.
            shared: other gateways use the table too.
        """
        self._store = store
        self._metrics = metrics
        self._shared = shared
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="jobs")
        self._lock = asyncio.Lock()
        self._live: dict[str, Job] = {}
        self._saved_s: dict[str, float] = {}
        self._unsaved: set[str] = set()
        self._signalled_s: dict[str, float] = {}
        self._watchers: dict[str, set[_Watcher]] = {}
        self._watchers_of_all: set[_Watcher] = set()
        self._elsewhere: dict[str, Job] = {}
        """Running jobs of other replicas as they were heard of last; only while somebody watches all."""
        self._draining = False
        self.on_lost: Callable[[str], None] = _nothing
        """Called with the id of a live job that turned out to have ended, or to be another gateway's."""

    async def create_all(self, new: Sequence[Job], request_hash: str) -> list[Job]:
        """Keep new jobs of one key, all or none, or give those that were made for the same request_ids before.

        Raises:
            AlreadyExists: a request_id was used with other parameters.
            QuotaExceeded: the key has made its jobs of the day.
        """
        return await self.in_thread(self._store.create_all, new, request_hash)

    async def create(self, job: Job, request_hash: str) -> Job:
        """Keep a new job, or give the one that was made for the same request_id before.

        Raises:
            AlreadyExists: the request_id was used with other parameters.
            QuotaExceeded: the key has made its jobs of the day.
        """
        return (await self.create_all([job], request_hash))[0]

    async def find_request(self, request_id: str, request_hash: str, key_id: str = "") -> Job | None:
        """The job that a key made for a request_id.

        Raises:
            AlreadyExists: it was made with other parameters.
        """
        job = await self.in_thread(self._store.find_request, request_id, request_hash, key_id)
        return self._freshest(job) if job is not None else None

    async def get(self, job_id: str) -> Job:
        """The job as it is now; one that is worked on here is known while the database is away, too.

        Raises:
            NotFound: there is none.
        """
        try:
            return self._freshest(await self.in_thread(self._store.get, job_id))
        except DatabaseAway:
            if job_id not in self._live:
                raise
            return self._live[job_id]

    async def page(self, *, page_size: int, page_token: str = "", wanted: JobFilter | None = None) -> JobPage:
        """A page of jobs.

        Raises:
            InvalidRequest: a page token that is not from this list.
        """
        page = await self.in_thread(self._store.page, page_size=page_size, page_token=page_token, wanted=wanted)
        return replace(page, jobs=tuple(self._freshest(job) for job in page.jobs))

    async def count_by_state(self, key_id: str | None = None) -> dict[JobState, int]:
        """Number of jobs in every state, of one key or of all."""
        return await self.in_thread(self._store.count_by_state, key_id)

    async def claimed(self, job: Job) -> None:
        """A job was taken by this gateway."""
        async with self._lock:
            self._live[job.id] = job
            self._tell(job)

    async def changed(self, job: Job) -> None:
        """A job that nobody works on was changed in the table."""
        async with self._lock:
            self._live.pop(job.id, None)
            self._tell(job)

    async def begin(self, job_id: str, setback: Setback | None = None) -> Job | None:
        """Count one more attempt, nothing done yet; waits for the database if it is away.

        Returns:
            None if the job has ended, is gone or is not this gateway's.
        """
        return await self.until_written(lambda: self._begin(job_id, setback))

    async def _begin(self, job_id: str, setback: Setback | None) -> Job | None:
        async with self._lock:
            job = await self.in_thread(self._store.begin, job_id, time.time(), setback)
            if job is None:
                self._lose(job_id)
            else:
                self._live[job_id] = job
                self._tell(job)
            return job

    async def enter(self, job_id: str, stage: JobStage, *, total: int = 0, done: int = 0) -> None:
        """A stage begins, with so much of it done before; kept at once."""
        await self._move(job_id, Progress(stage, done, total), keep=True)

    async def advance(self, job_id: str, done: int, total: int) -> None:
        """Steps or frames of the stage were finished; watchers know at once, the table within a second."""
        live = self._live.get(job_id)
        if live is not None:
            now_s = time.monotonic()
            late = now_s - self._saved_s.get(job_id, 0.0) >= _SAVE_INTERVAL_S
            progress = Progress(live.progress.stage, done, total)
            await self._move(job_id, progress, keep=late)
            if self._shared and not late and now_s - self._signalled_s.get(job_id, 0.0) >= _SIGNAL_INTERVAL_S:
                self._signalled_s[job_id] = now_s
                with contextlib.suppress(DatabaseAway):
                    await self.in_thread(self._store.signal, job_id, progress)

    async def is_ours(self, job_id: str) -> bool:
        """Whether this gateway may go on with a job that it works on; asks the table where others could have taken it.

        A database that is away, or whose disk is full, has given it to nobody.
        """
        live = self._live.get(job_id)
        if live is not None and self._shared:
            with contextlib.suppress(DiskFull):
                await self._move(job_id, live.progress, keep=True)
        return job_id in self._live

    async def keep_progress(self) -> None:
        """Write down how far jobs are whose last step came too soon after the one before to be written."""
        now_s = time.monotonic()
        for job_id in list(self._unsaved):
            live = self._live.get(job_id)
            if live is None:
                self._unsaved.discard(job_id)
            elif now_s - self._saved_s.get(job_id, 0.0) >= _SAVE_INTERVAL_S:
                await self._move(job_id, live.progress, keep=True)

    async def leave(self, job_id: str, stage: JobStage, seconds: float) -> None:
        """A stage was finished; kept at once."""
        self._metrics.stage_finished(stage.value, seconds)
        live = self._live.get(job_id)
        if live is not None:
            self._live[job_id] = replace(live, stage_seconds={**live.stage_seconds, stage.value: seconds})
            await self._move(job_id, live.progress, keep=True)

    async def finish(self, job_id: str, ending: Ending, num_bytes: int = 0) -> bool:
        """Write the terminal state, in this one place.

        Returns:
            False if the job had one already, which stands, or is another gateway's.
        """
        async with self._lock:
            live = self._live.get(job_id)
            progress = live.progress if live is not None else None
            job = await self.in_thread(self._store.finish, job_id, ending, time.time(), progress, num_bytes)
            if job is None:
                self._lose(job_id)
                return False
            self._forget(job_id)
            self._metrics.job_ended(ending.state.value)
            self._tell(job)
            return True

    def abandon(self, job_id: str) -> None:
        """Nothing works on a job here any more; what is told of it is what the table says."""
        self._forget(job_id)

    async def hear(self, signal: Signal) -> None:
        """Another replica changed a job: those who watch it here are told."""
        if self._watchers_of_all and signal.job_id and signal.job_id not in self._live:
            await self._hear_for_all(signal)
        if signal.job_id not in self._watchers:
            return
        if signal.progress is not None and signal.job_id not in self._live:
            for watcher in self._watchers[signal.job_id]:
                if watcher.latest is not None and watcher.latest.state is JobState.RUNNING:
                    watcher.tell(watcher.latest.at(signal.progress))
        else:
            await self.reread([signal.job_id])

    async def _hear_for_all(self, signal: Signal) -> None:
        job = self._elsewhere.get(signal.job_id)
        if job is None or signal.progress is None:
            try:
                job = await self.in_thread(self._store.get, signal.job_id)
            except (NotFound, DatabaseAway):
                return
        if signal.progress is not None and job.state is JobState.RUNNING:
            job = job.at(signal.progress)
        if job.state is JobState.RUNNING:
            self._elsewhere[job.id] = job
        else:
            self._elsewhere.pop(job.id, None)
        for watcher in self._watchers_of_all:
            watcher.tell(job)

    async def reread(self, job_ids: Collection[str]) -> None:
        """Tell those who watch some jobs what the table says, where that is something new."""
        for job_id in job_ids:
            async with self._lock:
                try:
                    job = self._freshest(await self.in_thread(self._store.get, job_id))
                except NotFound:
                    continue
                for watcher in self._watchers.get(job_id, ()):
                    if watcher.latest != job and not _is_behind(job, watcher.latest):
                        watcher.tell(job)

    @property
    def watched_elsewhere(self) -> list[str]:
        """Jobs that are watched here and not worked on here."""
        return [job_id for job_id in self._watchers if job_id not in self._live]

    async def delete(self, job_id: str) -> None:
        """Forget an ended job.

        Raises:
            FailedPrecondition: it has not ended.
        """
        await self.in_thread(self._store.delete, job_id)

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job as it is, then after every change, until it has ended.

        Raises:
            NotFound: there is none.
            Unavailable: the gateway is draining.
        """
        watcher = _Watcher()
        self._watchers.setdefault(job_id, set()).add(watcher)
        try:
            # Under the lock no state can change between the reading and the forgetting of what it already contains.
            async with self._lock:
                job = watcher.latest = await self.get(job_id)
                watcher.unread.clear()
            yield job
            while not job.state.ended:
                if self._draining:
                    raise Unavailable("the gateway is draining; watch again when it is back")
                watcher.changed.clear()
                while watcher.unread:
                    job = watcher.unread.popleft()
                    yield job
                    if job.state.ended:
                        return
                if not watcher.changed.is_set() and not self._draining:
                    await watcher.changed.wait()
        finally:
            watchers = self._watchers[job_id]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[job_id]

    def watch_all(self) -> AsyncGenerator[Job, None]:
        """Every job after each change from this call on, on whichever replica; ends when the gateway drains."""
        watcher = _Watcher(_MAX_UNREAD_OF_ALL)
        self._watchers_of_all.add(watcher)
        return self._changes_of_all(watcher)

    async def _changes_of_all(self, watcher: _Watcher) -> AsyncGenerator[Job, None]:
        try:
            while not self._draining:
                watcher.changed.clear()
                while watcher.unread:
                    yield watcher.unread.popleft()
                if not watcher.changed.is_set():
                    await watcher.changed.wait()
        finally:
            self._watchers_of_all.discard(watcher)

    def end_watches(self) -> None:
        """Send every watcher away, now and from now on, so that a drain need not wait for the jobs they watch."""
        self._draining = True
        for watchers in (*self._watchers.values(), self._watchers_of_all):
            for watcher in watchers:
                watcher.changed.set()

    def close(self) -> None:
        """End the threads after what they are at."""
        self._threads.shutdown()

    async def until_written(self, write: Callable[[], Awaitable[R]]) -> R:
        """The result of a write to the table, tried until it succeeds: no job runs on without anybody knowing."""
        while True:
            try:
                return await write()
            except (DiskFull, DatabaseAway) as error:
                log.error("the jobs table could not be written; trying again", reason=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _move(self, job_id: str, progress: Progress, *, keep: bool) -> None:
        live = self._live.get(job_id)
        if live is None:
            return
        job = self._live[job_id] = live.at(progress)
        self._tell(job)
        if not keep:
            self._unsaved.add(job_id)
            return
        self._unsaved.discard(job_id)
        self._saved_s[job_id] = time.monotonic()
        try:
            kept = await self.in_thread(self._store.save, job_id, progress, job.stage_seconds)
        except DatabaseAway as error:
            # The next one is kept, or the lease ends; a step more or less is no reason to give up the work.
            log.warning("progress was not kept", job_id=job_id, reason=error.message)
            return
        if kept is None:
            self._lose(job_id)

    def _lose(self, job_id: str) -> None:
        if job_id in self._live:
            self._forget(job_id)
            self.on_lost(job_id)

    def _forget(self, job_id: str) -> None:
        self._live.pop(job_id, None)
        self._saved_s.pop(job_id, None)
        self._unsaved.discard(job_id)
        self._signalled_s.pop(job_id, None)

    def _freshest(self, job: Job) -> Job:
        live = self._live.get(job.id)
        return live if live is not None and not job.state.ended else job

    def _tell(self, job: Job) -> None:
        for watcher in (*self._watchers.get(job.id, ()), *self._watchers_of_all):
            watcher.tell(job)

    async def in_thread(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of work on the database, in a thread.

        Raises:
            DatabaseAway: it cannot be reached.
            DiskFull: its disk is full.
        """

        def call() -> R:
            with database_away_is_said(), disk_full_is_said():
                return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
