"""The only writer of what becomes of jobs: to the table, and to everybody who watches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ParamSpec, TypeVar

from services.gateway.disk import disk_full_is_said
from services.gateway.jobs.domain import Ending, Job, JobStage, JobState, Progress
from services.gateway.jobs.store import JobPage, JobStore
from services.gateway.metrics import GatewayMetrics
from shared.errors import Unavailable

P = ParamSpec("P")
R = TypeVar("R")

_SAVE_INTERVAL_S = 1.0
_MAX_UNREAD = 256
"""Changes kept for a watcher that does not read; the oldest go first, and each is a whole job, so none is missed."""


class _Watcher:
    """One reader of one job's changes."""

    def __init__(self) -> None:
        self.unread: deque[Job] = deque(maxlen=_MAX_UNREAD)
        self.changed = asyncio.Event()

    def tell(self, job: Job) -> None:
        self.unread.append(job)
        self.changed.set()


class JobTracker:
    """Jobs as they are now: the table, and on top of it the progress that is not written yet.

    State changes are serialised by a lock, so that watchers see them in the order in which the table took them.
    """

    def __init__(self, store: JobStore, metrics: GatewayMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="jobs")
        self._lock = asyncio.Lock()
        self._live: dict[str, Job] = {}
        self._saved_s: dict[str, float] = {}
        self._watchers: dict[str, set[_Watcher]] = {}
        self._draining = False

    async def create(self, job: Job, request_hash: str) -> Job:
        """Keep a new job, or give the one that was made for the same request_id before.

        Raises:
            AlreadyExists: the request_id was used with other parameters.
        """
        return await self._in_thread(self._store.create, job, request_hash)

    async def find_request(self, request_id: str, request_hash: str) -> Job | None:
        """The job made for a request_id.

        Raises:
            AlreadyExists: it was made with other parameters.
        """
        job = await self._in_thread(self._store.find_request, request_id, request_hash)
        return self._freshest(job) if job is not None else None

    async def get(self, job_id: str) -> Job:
        """The job as it is now.

        Raises:
            NotFound: there is none.
        """
        return self._freshest(await self._in_thread(self._store.get, job_id))

    async def page(self, *, page_size: int, page_token: str, states: Collection[JobState]) -> JobPage:
        """A page of jobs, newest first.

        Raises:
            InvalidRequest: a page token that is not from this list.
        """

        def read() -> JobPage:
            return self._store.page(page_size=page_size, page_token=page_token, states=states)

        page = await self._in_thread(read)
        return replace(page, jobs=tuple(self._freshest(job) for job in page.jobs))

    async def unfinished_ids(self) -> list[str]:
        """Ids of all queued and running jobs, oldest first."""
        return await self._in_thread(self._store.unfinished_ids)

    async def count_by_state(self) -> dict[JobState, int]:
        """Number of jobs in every state."""
        return await self._in_thread(self._store.count_by_state)

    async def begin(self, job_id: str) -> Job | None:
        """Count one more attempt and set RUNNING; None if the job has ended or is gone."""
        async with self._lock:
            job = await self._in_thread(self._store.begin, job_id, time.time())
            if job is not None:
                self._live[job_id] = job
                self._tell(job)
            return job

    async def enter(self, job_id: str, stage: JobStage, *, total: int = 0) -> None:
        """A stage begins; kept at once."""
        await self._move(job_id, Progress(stage, 0, total), keep=True)

    async def advance(self, job_id: str, done: int, total: int) -> None:
        """Steps or frames of the stage were finished; watchers know at once, the table within a second."""
        live = self._live.get(job_id)
        if live is not None:
            late = time.monotonic() - self._saved_s.get(job_id, 0.0) >= _SAVE_INTERVAL_S
            await self._move(job_id, Progress(live.progress.stage, done, total), keep=late)

    async def leave(self, job_id: str, stage: JobStage, seconds: float) -> None:
        """A stage was finished; kept at once."""
        self._metrics.stage_finished(stage.value, seconds)
        live = self._live.get(job_id)
        if live is not None:
            self._live[job_id] = replace(live, stage_seconds={**live.stage_seconds, stage.value: seconds})
            await self._move(job_id, live.progress, keep=True)

    async def finish(self, job_id: str, ending: Ending) -> bool:
        """Write the terminal state, in this one place; False if the job had one already, which stands."""
        async with self._lock:
            live = self._live.get(job_id)
            progress = live.progress if live is not None else None
            job = await self._in_thread(self._store.finish, job_id, ending, time.time(), progress)
            if job is None:
                return False
            self._live.pop(job_id, None)
            self._saved_s.pop(job_id, None)
            self._metrics.job_ended(ending.state.value)
            self._tell(job)
            return True

    async def delete(self, job_id: str) -> None:
        """Forget an ended job.

        Raises:
            FailedPrecondition: it has not ended.
        """
        await self._in_thread(self._store.delete, job_id)

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
                job = await self.get(job_id)
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

    def end_watches(self) -> None:
        """Send every watcher away, now and from now on, so that a drain need not wait for the jobs they watch."""
        self._draining = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    def close(self) -> None:
        """End the threads after what they are at."""
        self._threads.shutdown()

    async def _move(self, job_id: str, progress: Progress, *, keep: bool) -> None:
        live = self._live.get(job_id)
        if live is None:
            return
        job = self._live[job_id] = live.at(progress)
        self._tell(job)
        if keep:
            self._saved_s[job_id] = time.monotonic()
            if await self._in_thread(self._store.save, job_id, progress, job.stage_seconds) is None:
                self._saved_s.pop(job_id, None)

    def _freshest(self, job: Job) -> Job:
        live = self._live.get(job.id)
        return live if live is not None and not job.state.ended else job

    def _tell(self, job: Job) -> None:
        for watcher in self._watchers.get(job.id, ()):
            watcher.tell(job)

    async def _in_thread(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        def call() -> R:
            with disk_full_is_said():
                return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
