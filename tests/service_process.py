"""Real service processes for tests: started on free ports, awaited by health, stopped at the end."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.warm_start import AVAILABLE, WarmProcess, start_warm

START_TIMEOUT_S = 150.0
WATCH_S = 5.0
"""Of one watch; after each the process is looked at."""
_ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class ServiceProcess:
    """A running `python -m services.<name>` and its log lines so far."""

    process: subprocess.Popen[str] | WarmProcess
    address: str = ""
    credentials: grpc.ChannelCredentials | None = None
    """How its control port is connected to; None: plain text."""
    log: list[dict[str, object]] = field(default_factory=list)
    logged: threading.Condition = field(default_factory=threading.Condition)
    """Told of every line."""

    def channel(self) -> grpc.Channel:
        """A channel to the control port."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address)
        return grpc.secure_channel(self.address, self.credentials)

    def wait_logged(self, event: str, *, count: int) -> None:
        """Return when so many lines of an event have been logged."""
        with self.logged:
            enough = self.logged.wait_for(
                lambda: sum(entry["event"] == event for entry in self.log) >= count, START_TIMEOUT_S
            )
        assert enough, f"{event!r} was not logged {count} times: {self.log[-5:]}"

    def wait_serving(self) -> None:
        """Return when health says SERVING; health streams its changes, so nothing is polled.

        A process that was killed may still take a connection while it dies; the watch that breaks then is begun again.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with self.channel() as channel:
            while not self._watch_until_serving(channel):
                assert self.process.poll() is None, f"the service ended: {self.log[-5:]}"
                assert time.monotonic() < deadline_s, f"the service does not serve: {self.log[-5:]}"

    def _watch_until_serving(self, channel: grpc.Channel) -> bool:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=WATCH_S, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
        return False


@contextlib.contextmanager
def running_service(
    name: str,
    *flags: str,
    serving: bool = True,
    ranks: int = 1,
    port: int = 0,
    module: str = "",
    credentials: grpc.ChannelCredentials | None = None,
) -> Iterator[ServiceProcess]:
    """Start a service on a loopback port; yields it when it listens (and serves, unless told not to).

    A single process begins warm, where that is possible; torchrun starts ranks from nothing.

    Args:
        name: of the package below `services`.
        flags: further arguments.
        serving: wait until health says SERVING.
        ranks: processes of the service, started by torchrun if more than one.
        port: 0 picks a free one.
        module: what is run, if not the package itself.
        credentials: of a service with TLS.
    """
    process = _start(module or f"services.{name}", ["--port", str(port), *flags], ranks)
    service = ServiceProcess(process, credentials=credentials)
    listening = threading.Event()

    def read_log() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"event": line.rstrip()}
            with service.logged:
                service.log.append(entry)
                service.logged.notify_all()
            if entry["event"] == "listening":
                service.address = entry["address"]
                listening.set()
        listening.set()

    reader = threading.Thread(target=read_log, daemon=True)
    reader.start()
    try:
        assert listening.wait(START_TIMEOUT_S), "the service did not begin to listen"
        if serving:
            assert service.address, f"the service ended: {service.log[-5:]}"
            service.wait_serving()
        yield service
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)


def _start(module: str, arguments: list[str], ranks: int) -> subprocess.Popen[str] | WarmProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if ranks == 1 and AVAILABLE:
        return start_warm(module, arguments, environment)
    launcher = ["-m", "shared.group.launch", "--nproc-per-node", str(ranks), "--max-restarts", "5"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", module, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=_ROOT)
