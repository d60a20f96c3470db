"""A running stack: four supervised services, the file that describes them, the lock on the data folder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cli.errors import UsageProblem
from cli.stack.plan import StackOptions, StackPlan, plan_stack
from cli.stack.supervisor import Notify, ServiceState, StateChange, SupervisedService

STACK_FILE = "stack.json"
_LOCK_FILE = "stack.lock"


class Stack:
    """The services of a plan, started and watched together."""

    def __init__(self, plan: StackPlan, notify: Notify) -> None:
        """
        Args:
            plan: what to run.
            notify: called on the event loop for every change of a service's state.

        Raises:
            OSError: the log folder cannot be written.
        """
        self.plan = plan
        self._listener = notify
        self._begin = datetime.now(UTC)
        self._gateway = SupervisedService(plan.gateway, self._notify)
        self._stages = [SupervisedService(spec, self._notify) for spec in plan.stages]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start everything at once; returns when all serve.

        Raises:
            ServiceFailed: one of them cannot run.
        """
        self._tasks = [asyncio.create_task(service.run(), name=service.spec.name) for service in self._services]
        ready = asyncio.create_task(self._all_serving())
        try:
            await asyncio.wait({ready, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()
        finally:
            ready.cancel()

    async def wait(self) -> None:
        """Run until a service cannot.

        Raises:
            ServiceFailed: always, when it returns at all.
        """
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._raise_failure()

    async def stop(self) -> None:
        """Stop the gateway, so that no new work comes, then the stages; returns when no process is left."""
        await self._gateway.stop()
        await asyncio.gather(*(stage.stop() for stage in self._stages))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def kill(self) -> None:
        """End every process at once."""
        await asyncio.gather(*(service.kill() for service in self._services))

    @property
    def _services(self) -> list[SupervisedService]:
        return [self._gateway, *self._stages]

    async def _all_serving(self) -> None:
        for service in self._services:
            await service.serving.wait()

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    def _notify(self, change: StateChange) -> None:
        self._listener(change)
        if change.state in (ServiceState.SERVING, ServiceState.RESTARTING):
            write_json(self.plan.options.data_dir / STACK_FILE, self._describe())

    def _describe(self) -> dict[str, Any]:
        services = {
            service.spec.name: {
                "address": service.spec.address,
                "pid": service.pid,
                "starts": service.starts,
                "log": str(service.spec.log_path),
            }
            for service in self._services
        }
        return {
            "supervisor_pid": os.getpid(),
            "start_time": self._begin.isoformat(),
            "checkpoints": str(self.plan.options.checkpoints),
            "grpc_address": self.plan.grpc_address,
            "http_url": self.plan.http_url,
            "tls_cert": None if self.plan.gateway.tls_cert is None else str(self.plan.gateway.tls_cert),
            "services": services,
        }


@contextlib.asynccontextmanager
async def running_stack(options: StackOptions, notify: Notify) -> AsyncIterator[Stack]:
    """A stack that serves inside the `async with`, and has left no process behind after it.

    Raises:
        UsageProblem: a port is taken, or the data folder is not usable or in use.
        ServiceFailed: a service cannot run; also raised inside, wherever the block is waiting.
    """
    with locked_data_dir(options.data_dir):
        plan = plan_stack(options)
        stack = Stack(plan, notify)
        try:
            await stack.start()
            async with _ended_by_failure(stack):
                yield stack
        finally:
            try:
                await stack.stop()
            except asyncio.CancelledError:
                # Asked a second time: no more patience.
                await stack.kill()
                raise
            finally:
                plan.close()
                (options.data_dir / STACK_FILE).unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _ended_by_failure(stack: Stack) -> AsyncIterator[None]:
    block = asyncio.current_task()
    assert block is not None
    watcher = asyncio.create_task(stack.wait())
    watcher.add_done_callback(lambda task: None if task.cancelled() else block.cancel())
    try:
        yield
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            block.uncancel()
            watcher.result()
        raise
    finally:
        watcher.cancel()


@contextlib.contextmanager
def locked_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data folder, made if need be; one stack at a time.

    Raises:
        UsageProblem: it cannot be written, or another stack uses it.
    """
    with open_lock(data_dir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = read_stack_file(data_dir)
            where = f" (gRPC at {running['grpc_address']}, process {running['supervisor_pid']})" if running else ""
            raise UsageProblem(
                f"--data-dir: {data_dir} is in use by another stack{where}; stop it or choose another folder"
            ) from None
        # A supervisor that was killed left its own behind, and whoever comes now would be told of that one.
        (data_dir / STACK_FILE).unlink(missing_ok=True)
        yield


def open_lock(data_dir: Path) -> IO[bytes]:
    """The lock file of a data folder; makes the folder.

    Raises:
        UsageProblem: it cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return (data_dir / _LOCK_FILE).open("ab")
    except OSError as error:
        raise UsageProblem(f"--data-dir: {data_dir} cannot be written ({error.strerror}); choose another") from None


def live_stack(data_dir: Path) -> dict[str, Any] | None:
    """What stack.json says of the stack that uses this data folder now; None if none does."""
    lock = data_dir / _LOCK_FILE
    if not lock.is_file():
        return None
    with open_lock(data_dir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_stack_file(data_dir)
    return None


def read_stack_file(data_dir: Path) -> dict[str, Any] | None:
    """The content of stack.json; None before a stack has begun to serve."""
    try:
        content = json.loads((data_dir / STACK_FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file in one step; readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
