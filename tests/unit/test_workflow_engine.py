"""What the pipeline relies on in the workflow engine, asked of the engine itself, without any of our jobs.

Everything here is public in DBOS 3.4, but not all of it is promised; after a change of its version this says whether
the pipeline still stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from services.gateway.database import open_database
from services.gateway.pipeline.workflows import CANCELLED, Workflows
from shared.errors import DeadlineExceeded, ReferenceLost

WAIT_S = 30.0


class Engine:
    """An engine whose workflow is told by a test what to do."""

    def __init__(self, folder: Path, name: str, body: Callable[[Workflows, str], Coroutine[Any, Any, None]]) -> None:
        self.database = open_database(folder / "engine.sqlite3")
        self.workflows = Workflows(self.database, name)
        self.body = body
        self.ended = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[BaseException] = []

    async def work(self, job_id: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        try:
            await self.body(self.workflows, job_id)
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self.ended.set()

    async def end(self) -> None:
        await asyncio.wait_for(self.ended.wait(), WAIT_S)
        self.ended.clear()

    async def __aenter__(self) -> Engine:
        await self.workflows.launch(self.work)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.workflows.close()
        self.database.dispose()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


def test_another_process_resumes_a_workflow_and_skips_its_finished_steps(tmp_path):
    done: list[str] = []
    reached = asyncio.Event()

    async def first() -> dict[str, int]:
        done.append("first")
        return {"value": 7}

    async def second() -> None:
        done.append("second")
        reached.set()
        await asyncio.sleep(WAIT_S if done.count("second") == 1 else 0)

    async def body(workflows: Workflows, job_id: str) -> None:
        assert await workflows.step("first", first, WAIT_S) == {"value": 7}
        await workflows.step("second", second, WAIT_S)

    async def scenario() -> None:
        async with Engine(tmp_path, "one", body) as engine:
            assert await engine.workflows.start("job_1") is None
            await reached.wait()
            engine.tasks[0].cancel()
            await engine.end()
            assert isinstance(engine.errors[0], asyncio.CancelledError), "a cancel reaches the step"
        async with Engine(tmp_path, "two", body) as engine:
            assert await engine.workflows.start("job_1") is None, "a cancelled task leaves its workflow unfinished"
            await engine.end()
            assert done == ["first", "second", "second"] and engine.errors == []
            while (ended := await engine.workflows.start("job_1")) is None:
                await asyncio.sleep(0.05)
            assert ended.value == "SUCCESS"

    run(scenario())


def test_a_workflow_is_resumed_within_the_same_process_too(tmp_path):
    attempts = []

    async def stage() -> None:
        attempts.append(asyncio.current_task())
        await asyncio.sleep(WAIT_S if len(attempts) == 1 else 0)

    async def body(workflows: Workflows, job_id: str) -> None:
        await workflows.step("stage", stage, WAIT_S)

    async def scenario() -> None:
        async with Engine(tmp_path, "one", body) as engine:
            await engine.workflows.start("job_1")
            while not attempts:
                await asyncio.sleep(0.01)
            engine.tasks[0].cancel()
            await engine.end()
            assert await engine.workflows.start("job_1") is None
            await engine.end()
            assert len(attempts) == 2 and len(engine.errors) == 1

    run(scenario())


def test_errors_of_steps_are_remembered_by_their_reason_and_time_runs_out(tmp_path):
    tries: list[int] = []

    async def lost() -> None:
        tries.append(1)
        raise ReferenceLost("gone")

    async def slow() -> None:
        await asyncio.sleep(WAIT_S)

    async def body(workflows: Workflows, job_id: str) -> None:
        with pytest.raises(ReferenceLost, match="gone"):
            await workflows.step("lost", lost, WAIT_S)
        with pytest.raises(DeadlineExceeded, match="longer than"):
            await workflows.step("slow", slow, 0.2)

    async def scenario() -> None:
        async with Engine(tmp_path, "one", body) as engine:
            await engine.workflows.start("job_1")
            await engine.end()
            assert engine.errors == [] and tries == [1]

    run(scenario())


def test_a_cancelled_and_a_forgotten_workflow(tmp_path):
    async def stage() -> None:
        await asyncio.sleep(WAIT_S)

    async def body(workflows: Workflows, job_id: str) -> None:
        await workflows.step("stage", stage, WAIT_S)

    async def scenario() -> None:
        async with Engine(tmp_path, "one", body) as engine:
            await engine.workflows.cancel("job_never")
            await engine.workflows.forget("job_never")
            await engine.workflows.start("job_1")
            await engine.workflows.cancel("job_1")
            await engine.end()
            assert await engine.workflows.start("job_1") is CANCELLED
            await engine.workflows.forget("job_1")
            assert await engine.workflows.start("job_1") is None, "it begins anew"
            while len(engine.tasks) < 2:
                await asyncio.sleep(0.01)
            engine.tasks[1].cancel()
            await engine.end()
            await engine.workflows.forget_executors({"other"})

    run(scenario())
