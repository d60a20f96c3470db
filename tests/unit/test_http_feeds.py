"""Feeds of a job's events: what readers get who come late, come back, or wait for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from services.gateway.http.jobs_api import feeds
from services.gateway.http.jobs_api.feeds import JobFeeds
from services.gateway.jobs.domain import ClipParameters, Job, JobStage, JobState, Progress
from shared.errors import NotFound, Unavailable
from shared.sampling_options import SamplingOptions

WAIT_S = 10.0
PARAMETERS = ClipParameters("a bell", "", "", "720x720_5s", 64, 64, 121, SamplingOptions())


class Watch:
    """An engine whose one job changes when the test says so."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[Job | Exception] = asyncio.Queue()
        self.watches = 0

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        self.watches += 1
        while True:
            change = await self.changes.get()
            if isinstance(change, Exception):
                raise change
            yield change
            if change.state.ended:
                return


def job(done: int, state: JobState = JobState.RUNNING) -> Job:
    return Job("job_1", PARAMETERS, 0.0, state=state, progress=Progress(JobStage.DENOISE, done, 9))


async def told(events: AsyncIterator[bytes]) -> tuple[str, str]:
    """(id, data) of the next event."""
    text = (await asyncio.wait_for(anext(events), WAIT_S)).decode()
    fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
    return fields["id"], fields["data"]


def test_readers_share_one_watch_and_come_back_behind_what_they_saw():
    async def run() -> None:
        engine = Watch()
        board = JobFeeds(engine, lambda shown: str(shown.progress.done))
        for done in (0, 1):
            engine.changes.put_nowait(job(done))
        first = await board.open("job_1", "")
        seen = [await told(first)]
        while seen[-1][1] != "1":
            seen.append(await told(first))
        second = await board.open("job_1", "")
        assert (await told(second))[1] == "1", "the present state"
        engine.changes.put_nowait(job(2))
        engine.changes.put_nowait(job(3))
        assert [(await told(second))[1] for _ in range(2)] == ["2", "3"]
        back = await board.open("job_1", seen[-1][0])
        assert [(await told(back))[1] for _ in range(2)] == ["2", "3"], "nothing missed, nothing twice"
        for other in ("other-1", "end", "x", f"{seen[-1][0]}0"):
            assert (await told(await board.open("job_1", other)))[1] == "3", other
        engine.changes.put_nowait(job(3, JobState.COMPLETED))
        assert [await told(reader) for reader in (first, second, back)][1:] == [("end", "3")] * 2
        with pytest.raises(StopAsyncIteration):
            await anext(second)
        assert engine.watches == 1

    asyncio.run(run())


def test_silence_is_broken_by_a_comment(monkeypatch):
    monkeypatch.setattr(feeds, "HEARTBEAT_S", 0.05)

    async def run() -> None:
        engine = Watch()
        board = JobFeeds(engine, lambda shown: str(shown.progress.done))
        engine.changes.put_nowait(job(0))
        events = await board.open("job_1", "")
        await told(events)
        for _ in range(2):
            comment = await asyncio.wait_for(anext(events), WAIT_S)
            assert comment.startswith(b":") and comment.endswith(b"\n\n")
        engine.changes.put_nowait(job(1))
        while (event := await asyncio.wait_for(anext(events), WAIT_S)).startswith(b":"):
            continue
        assert b"data: 1" in event

    asyncio.run(run())


def test_a_refusal_is_told_before_anything_is_sent_and_not_remembered():
    async def run() -> None:
        engine = Watch()
        board = JobFeeds(engine, lambda shown: "")
        engine.changes.put_nowait(NotFound("there is no job"))
        with pytest.raises(NotFound):
            await board.open("job_1", "")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.changes.put_nowait(job(0))
        events = await board.open("job_1", "")
        await told(events)
        engine.changes.put_nowait(Unavailable("draining"))
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(events), WAIT_S)
        assert engine.watches == 2

    asyncio.run(run())


def test_feeds_that_nobody_reads_end_after_a_while(monkeypatch):
    monkeypatch.setattr(feeds, "_LINGER_S", 0.05)

    async def run() -> None:
        engine = Watch()
        board = JobFeeds(engine, lambda shown: str(shown.progress.done))
        engine.changes.put_nowait(job(0))
        events = await board.open("job_1", "")
        await told(events)
        await events.aclose()
        async with asyncio.timeout(WAIT_S):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)
        engine.changes.put_nowait(job(1))
        assert (await told(await board.open("job_1", "")))[1] == "1"
        assert engine.watches == 2, "the old watch was given up"

    asyncio.run(run())
