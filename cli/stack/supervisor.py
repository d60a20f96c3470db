"""Keeps the services running: start, health, restart with back-off, orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.connection import Connection
from cli.stack.logs import ServiceLog
from cli.stack.plan import ServiceSpec
from shared import death_signal
from shared.errors import EXIT_BAD_CONFIG

_HEALTH_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 2.0
_MAX_STARTS_UNSERVED = 5
"""Deaths by signal before a service has ever served, after which it is given up."""


class ServiceState(enum.Enum):
    """Where a service is in its life, as shown to people."""

    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True)
class StateChange:
    """A service entered `state`."""

    service: str
    state: ServiceState
    detail: str = ""


Notify = Callable[[StateChange], None]


class ServiceFailed(Exception):
    """A service ended in a way that starting it again does not mend."""

    def __init__(self, service: str, exit_status: int, reason: str, log_path: Path) -> None:
        self.service = service
        self.exit_status = exit_status
        super().__init__(f"{service} cannot run ({describe_exit(exit_status)}): {reason}\nIts log is {log_path}")


@dataclass(frozen=True)
class BackOff:
    """Waiting times between restarts: doubling from first_s to most_s; afresh once a service has served for calm_s."""

    first_s: float = 0.5
    most_s: float = 30.0
    calm_s: float = 60.0

    def delay_s(self, crashes: int) -> float:
        """Seconds before the next start after `crashes` crashes in a row, 1 or more."""
        return float(min(self.most_s, self.first_s * 2.0 ** min(crashes - 1, 30)))


def describe_exit(status: int) -> str:
    """A process's end in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class SupervisedService:
    """One service and its restarts.

    A crash is a death by signal, or an exit after the service had served once. A service that exits before it ever
    served, or with EXIT_BAD_CONFIG, says that it cannot run; so does one that is killed again and again while loading.
    """

    def __init__(self, spec: ServiceSpec, notify: Notify, back_off: BackOff | None = None) -> None:
        """
        Raises:
            OSError: its log cannot be written.
        """
        self.spec = spec
        self.pid: int | None = None
        self.starts = 0
        self.serving = asyncio.Event()
        self._notify = notify
        self._back_off = back_off or BackOff()
        self._log = ServiceLog(spec.name, spec.log_path)
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._has_served = False
        self._serving_since_s: float | None = None

    async def run(self) -> None:
        """Keep the service running until `stop`.

        Raises:
            ServiceFailed: it cannot run.
        """
        crashes = 0
        try:
            while not self._stopping.is_set():
                status, served_s = await self._run_once()
                if self._stopping.is_set():
                    break
                if self._is_hopeless(status):
                    raise ServiceFailed(self.spec.name, status, self._log.last_words(), self.spec.log_path)
                crashes = 1 if served_s >= self._back_off.calm_s else crashes + 1
                delay_s = self._back_off.delay_s(crashes)
                self._say(ServiceState.RESTARTING, f"in {delay_s:g} s ({describe_exit(status)})")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), delay_s)
        finally:
            self._log.close()
        self._say(ServiceState.STOPPED)

    def _is_hopeless(self, status: int) -> bool:
        if self._has_served:
            return status == EXIT_BAD_CONFIG
        return status >= 0 or self.starts >= _MAX_STARTS_UNSERVED

    async def stop(self) -> None:
        """SIGTERM, the spec's grace, then SIGKILL to all its processes. Returns when it has ended."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._say(ServiceState.STOPPING)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), self.spec.grace_s)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to the service and whatever it has started, now."""
        self._stopping.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def _run_once(self) -> tuple[int, float]:
        """Start, wait for the end; (exit status, seconds it had served)."""
        self._log.forget()
        self._serving_since_s = None
        self._say(ServiceState.STARTING)
        self._process = process = await self._spawn()
        self.pid = process.pid
        self.starts += 1
        if self._stopping.is_set():
            await self.kill()
        assert process.stdout is not None
        output = asyncio.create_task(self._log.follow(process.stdout))
        health = asyncio.create_task(self._await_health())
        try:
            status = await process.wait()
            # Its pipe may be held open by something it started; the words of the service itself are there at once.
            await asyncio.wait({output}, timeout=1.0)
        finally:
            self.serving.clear()
            for task in (health, output):
                task.cancel()
            await asyncio.gather(health, output, return_exceptions=True)
        since_s = self._serving_since_s
        return status, 0.0 if since_s is None else time.monotonic() - since_s

    async def _spawn(self) -> asyncio.subprocess.Process:
        wrapper = (sys.executable, "-I", "-S", death_signal.__file__, str(os.getpid()))
        return await asyncio.create_subprocess_exec(
            *wrapper,
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | self.spec.environment,
            # A process group of its own: Ctrl-C in the terminal reaches the supervisor alone, which stops in order.
            start_new_session=True,
        )

    async def _await_health(self) -> None:
        begin_s = time.monotonic()
        async with Connection.of_own_stack(self.spec.tls_cert).open(self.spec.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not await _is_serving(stub):
                await asyncio.sleep(_HEALTH_POLL_S)
        self._serving_since_s = time.monotonic()
        self._has_served = True
        self._say(ServiceState.SERVING, f"at {self.spec.address} after {self._serving_since_s - begin_s:.1f} s")
        self.serving.set()

    def _say(self, state: ServiceState, detail: str = "") -> None:
        self._notify(StateChange(self.spec.name, state, detail))


async def _is_serving(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
