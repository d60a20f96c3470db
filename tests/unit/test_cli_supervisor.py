"""The supervisor against real child programs that serve real gRPC health."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cli.stack.logs import KEPT_FILES, MAX_LINE_BYTES, ServiceLog
from cli.stack.plan import ServiceSpec
from cli.stack.ports import ReservedPort, reserve_grpc_port
from cli.stack.supervisor import BackOff, ServiceFailed, ServiceState, StateChange, SupervisedService, describe_exit
from shared.errors import EXIT_BAD_CONFIG

SERVICE = """
import json, signal, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

port, mode = sys.argv[1], sys.argv[2]
if mode == "misfit":
    entry = {"level": "error", "event": "cannot start", "reason": "weights.pth: does not fit"}
    print(json.dumps(entry), file=sys.stderr)
    sys.exit(3)
if mode == "typo":
    sys.exit("--device 'gpu' is unknown")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    print(json.dumps({"helper": helper.pid}), flush=True)
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
server = grpc.server(ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port(f"127.0.0.1:{port}")
server.start()
server.wait_for_termination()
"""

SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from cli.stack.plan import ServiceSpec
from cli.stack.supervisor import SupervisedService

async def main():
    log, script, port = sys.argv[1:]
    spec = ServiceSpec("stage", (sys.executable, script, port, "good"), f"127.0.0.1:{port}", Path(log), 5.0)
    service = SupervisedService(spec, lambda change: None)
    running = asyncio.create_task(service.run())
    await service.serving.wait()
    print(service.pid, flush=True)
    await running

asyncio.run(main())
"""

QUICK = BackOff(first_s=0.01, most_s=0.02, calm_s=60.0)


class Child:
    """A supervised child of one behaviour, and what was told about it."""

    def __init__(self, tmp_path: Path, mode: str, grace_s: float = 10.0) -> None:
        script = tmp_path / "service.py"
        script.write_text(SERVICE)
        self.port: ReservedPort = reserve_grpc_port("127.0.0.1", 0, flag="--port")
        self.log_path = tmp_path / "logs" / "stage.log"
        command = (sys.executable, str(script), str(self.port.number), mode)
        self.changes: list[StateChange] = []
        self.spec = ServiceSpec("stage", command, f"127.0.0.1:{self.port.number}", self.log_path, grace_s)

    def service(self) -> SupervisedService:
        return SupervisedService(self.spec, self.changes.append, QUICK)

    def states(self) -> list[ServiceState]:
        return [change.state for change in self.changes]


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., Child]:
    return lambda *args, **kwargs: Child(tmp_path, *args, **kwargs)


def test_a_killed_service_is_started_again_and_stops_on_request(child: Callable[..., Child]) -> None:
    good = child("good")

    async def scenario() -> tuple[int | None, int | None]:
        service = good.service()
        running = asyncio.create_task(service.run())
        await service.serving.wait()
        first = service.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while service.pid == first or not service.serving.is_set():
            await asyncio.sleep(0)
        second = service.pid
        await service.stop()
        await running
        return first, second

    first, second = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert first != second
    assert not psutil.pid_exists(first or 0)
    assert not psutil.pid_exists(second or 0)
    starting, serving = ServiceState.STARTING, ServiceState.SERVING
    expected = [starting, serving, ServiceState.RESTARTING, starting, serving]
    assert good.states() == [*expected, ServiceState.STOPPING, ServiceState.STOPPED]
    assert "SIGKILL" in good.changes[2].detail


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [("misfit", EXIT_BAD_CONFIG, "weights.pth: does not fit"), ("typo", 1, "--device 'gpu' is unknown")],
)
def test_a_service_that_cannot_run_is_not_tried_again(
    child: Callable[..., Child], mode: str, status: int, words: str
) -> None:
    bad = child(mode)
    with pytest.raises(ServiceFailed) as raised:
        asyncio.run(asyncio.wait_for(bad.service().run(), 60))
    assert raised.value.exit_status == status
    assert words in str(raised.value)
    assert str(bad.log_path) in str(raised.value)
    assert bad.states() == [ServiceState.STARTING]


def test_a_service_that_ignores_sigterm_is_killed_with_its_helpers(child: Callable[..., Child]) -> None:
    stubborn = child("stubborn", grace_s=0.2)

    async def scenario() -> int | None:
        service = stubborn.service()
        running = asyncio.create_task(service.run())
        await service.serving.wait()
        await service.stop()
        await running
        return service.pid

    pid = asyncio.run(asyncio.wait_for(scenario(), 60))
    helper = next(entry["helper"] for entry in map(json.loads, stubborn.log_path.read_text().splitlines()))
    left = [psutil.Process(number) for number in (pid, helper) if number and psutil.pid_exists(number)]
    _, alive = psutil.wait_procs(left, timeout=10)
    # The helper became a child of init; where init does not reap, a zombie is as dead as can be seen.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_stopping_while_the_service_is_being_started_leaves_nothing(child: Callable[..., Child]) -> None:
    good = child("good")

    async def scenario() -> int | None:
        service = good.service()
        running = asyncio.create_task(service.run())
        await asyncio.sleep(0)  # the task is now inside the start of its process
        await service.stop()
        await running
        return service.pid

    pid = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert pid is None or not psutil.pid_exists(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's own")
def test_services_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    port = reserve_grpc_port("127.0.0.1", 0, flag="--port")
    arguments = [str(tmp_path / "stage.log"), str(script), str(port.number)]
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, *arguments], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    service = psutil.Process(int(supervisor.stdout.readline()))
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    _, alive = psutil.wait_procs([service], timeout=10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_back_off_doubles_up_to_its_bound() -> None:
    back_off = BackOff(first_s=0.5, most_s=30.0)
    assert [back_off.delay_s(n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert back_off.delay_s(10_000) == 30.0


def test_an_exit_is_described_in_words() -> None:
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(-signal.SIGTERM) == "killed by SIGTERM"
    assert describe_exit(-250) == "killed by signal 250"


def test_a_log_keeps_json_wraps_the_rest_and_stays_bounded(tmp_path: Path) -> None:
    log = ServiceLog("vae", tmp_path / "vae.log", max_file_bytes=2000)
    log.write(b'{"event": "hello", "level": "info"}')
    log.write(b"Traceback \xff of a C library")
    log.write(b"   ")
    for index in range(400):
        log.write(json.dumps({"event": f"step {index}"}).encode())
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + KEPT_FILES
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert {"event": "step 399"} in entries
    assert max(file.stat().st_size for file in files) < 2200


def test_a_log_remembers_the_reason_or_the_last_lines(tmp_path: Path) -> None:
    log = ServiceLog("vae", tmp_path / "vae.log")
    assert log.last_words() == "it printed nothing"
    log.write(b"first")
    log.write(b"second")
    assert log.last_words() == "first\nsecond"
    log.write(b'{"level": "error", "event": "cannot start", "reason": "x.pth: truncated"}')
    log.write(b"bye")
    assert log.last_words() == "x.pth: truncated"
    log.forget()
    assert log.last_words() == "it printed nothing"
    log.close()


def test_a_log_cuts_endless_lines(tmp_path: Path) -> None:
    async def scenario(log: ServiceLog) -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(b"x" * (3 * MAX_LINE_BYTES) + b"\nshort\nunfinished")
        stream.feed_eof()
        await log.follow(stream)

    log = ServiceLog("vae", tmp_path / "vae.log")
    asyncio.run(scenario(log))
    log.close()
    events = [json.loads(line)["event"] for line in log.path.read_text().splitlines()]
    assert "".join(events[:-2]) == "x" * (3 * MAX_LINE_BYTES)
    assert events[-2:] == ["short", "unfinished"]
