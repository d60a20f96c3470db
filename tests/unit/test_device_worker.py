"""The device thread: order, bounds, cancellation between yields, errors."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from shared.device_worker import DeviceWorker
from shared.errors import ResourceExhausted

TIMEOUT_S = 10.0


@pytest.fixture
def worker():
    worker = DeviceWorker("test", max_pending=2)
    yield worker
    worker.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def test_items_come_in_order_from_one_thread(worker) -> None:
    def work():
        for index in range(100):
            yield index, threading.get_ident()

    async def main():
        return [item async for item in worker.stream(work)]

    items = run(main())
    assert [index for index, _ in items] == list(range(100))
    assert {thread for _, thread in items}.isdisjoint({threading.get_ident()})
    assert len({thread for _, thread in items}) == 1


def test_errors_reach_the_caller_and_the_thread_lives_on(worker) -> None:
    def fail():
        raise KeyError("boom")

    async def main():
        with pytest.raises(KeyError, match="boom"):
            await worker.run(fail)
        return await worker.run(lambda: 7)

    assert run(main()) == 7
    assert worker.num_pending == 0


def test_leaving_the_stream_stops_the_work_at_its_next_yield(worker) -> None:
    steps, closed = [], threading.Event()
    go_on = threading.Semaphore(1)

    def work():
        try:
            for index in range(1000):
                assert go_on.acquire(timeout=TIMEOUT_S)
                steps.append(index)
                yield index
        finally:
            closed.set()

    async def main():
        async with contextlib.aclosing(worker.stream(work)) as stream:
            async for index in stream:
                if index == 2:
                    break
                go_on.release()
            go_on.release()
        assert closed.is_set(), "the stream's end must wait for the work's end"

    run(main())
    assert len(steps) <= 4, "at most the step under way is finished"
    assert worker.num_pending == 0
    assert worker.cuts.number == 1 and 0 < worker.cuts.seconds < TIMEOUT_S


def test_only_what_the_device_was_at_counts_as_cut(worker) -> None:
    async def main():
        await worker.run(lambda: None)
        with pytest.raises(ValueError, match="refused"):
            await worker.run(lambda: int("refused"))

    run(main())
    assert worker.cuts.number == 0


def test_a_waiting_job_that_is_cancelled_never_begins(worker) -> None:
    release, begun, waiting_began = threading.Event(), threading.Event(), threading.Event()

    def block():
        begun.set()
        assert release.wait(TIMEOUT_S)

    async def main():
        first = asyncio.ensure_future(worker.run(block))
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        second = asyncio.ensure_future(worker.run(waiting_began.set))
        await asyncio.sleep(0)
        assert worker.num_pending == 2
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert worker.num_pending == 1, "a job that never began frees its place at once"
        release.set()
        await first
        await worker.run(lambda: None)

    run(main())
    assert not waiting_began.is_set()


def test_a_full_queue_refuses(worker) -> None:
    release = threading.Event()

    async def main():
        jobs = [asyncio.ensure_future(worker.run(lambda: release.wait(TIMEOUT_S))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match=r"test queue is full \(2 of 2\)"):
            await worker.run(lambda: None)
        release.set()
        await asyncio.gather(*jobs)
        assert await worker.run(lambda: 1) == 1

    run(main())


def test_closing_says_whether_the_thread_has_ended() -> None:
    worker = DeviceWorker("test", max_pending=2)
    begun, release = threading.Event(), threading.Event()

    def block():
        begun.set()
        assert release.wait(TIMEOUT_S)

    async def main():
        job = asyncio.ensure_future(worker.run(block))
        assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
        assert not worker.close(timeout_s=0.01)
        release.set()
        await job
        assert worker.close(timeout_s=TIMEOUT_S)

    run(main())
