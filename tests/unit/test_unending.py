"""Loops that go on whatever happens in one turn of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.config import PipelineOptions
from services.gateway.pipeline.pipeline import Pipeline
from shared.unending import unending

TIMEOUT_S = 10.0


def test_a_loop_is_begun_again_after_something_unforeseen() -> None:
    async def check() -> None:
        turns, went_on = 0, asyncio.Event()

        async def loop() -> None:
            nonlocal turns
            turns += 1
            if turns == 1:
                raise RuntimeError("unforeseen")
            went_on.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(unending("the test's loop", loop, pause_s=0.0))
        await asyncio.wait_for(went_on.wait(), TIMEOUT_S)
        assert turns == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, TIMEOUT_S)

    asyncio.run(check())


def test_work_that_ends_is_not_begun_again() -> None:
    async def check() -> None:
        turns = 0

        async def ends() -> None:
            nonlocal turns
            turns += 1

        await asyncio.wait_for(unending("ends", ends), TIMEOUT_S)
        assert turns == 1

    asyncio.run(check())


def test_jobs_are_taken_after_a_turn_of_the_queue_failed_in_an_unforeseen_way() -> None:
    """A gateway that answers and takes no jobs any more would be worse than one that ends."""

    async def check() -> None:
        looks, looked_again = 0, asyncio.Event()

        class Queue:
            def claim(self, now_s: float) -> None:
                nonlocal looks
                looks += 1
                if looks == 1:
                    raise RuntimeError("unforeseen")

        class Tracker:
            on_lost: Any = None

            async def in_thread(self, work: Any, *args: Any) -> Any:
                result = work(*args)
                looked_again.set()
                return result

        class Workflows:
            async def launch(self, make_clip: Any) -> None: ...

            async def close(self) -> None: ...

        queue = Queue()
        queue.release = lambda: 0  # type: ignore[attr-defined]
        pipeline = Pipeline(
            cast(Any, Workflows()),
            cast(Any, queue),
            cast(Any, Tracker()),
            cast(Any, SimpleNamespace(num_workers=1)),
            cast(Any, SimpleNamespace()),
            PipelineOptions(max_concurrent_jobs=1, worker_wait_s=1.0, stage_timeout_s=1.0),
            may_work=lambda: True,
            num_gateways=lambda: 1,
        )
        await pipeline.launch()
        await asyncio.wait_for(looked_again.wait(), TIMEOUT_S)
        assert looks >= 2
        await pipeline.close()

    asyncio.run(check())
