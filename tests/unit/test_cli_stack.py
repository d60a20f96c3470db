"""Ports, plans, checkpoint choice, the data folder's lock."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cli.errors import UsageProblem
from cli.stack.checkpoints import choose_checkpoints, holds_release
from cli.stack.plan import StackOptions, plan_stack
from cli.stack.ports import connect_host, free_http_port, reserve_grpc_port
from cli.stack.stack import STACK_FILE, live_stack, locked_data_dir, write_json
from shared.variants import VARIANTS


def test_a_reserved_port_serves_grpc_and_nothing_else() -> None:
    port = reserve_grpc_port("127.0.0.1", 0, flag="--grpc-port")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port.number))
    server = grpc.server(ThreadPoolExecutor(1))
    assert server.add_insecure_port(f"127.0.0.1:{port.number}") == port.number
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port.number}") as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
    server.stop(None).wait()
    port.close()


def test_a_port_with_a_grpc_server_on_it_is_taken() -> None:
    """gRPC shares ports silently (SO_REUSEPORT): two stacks on one port would each get half of the calls."""
    server = grpc.server(ThreadPoolExecutor(1))
    number = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(UsageProblem, match=rf"--grpc-port: port {number} is taken"):
        reserve_grpc_port("127.0.0.1", number, flag="--grpc-port")
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 65536, "--http-port: got 65536"),
        ("127.0.0.1", -1, "--http-port: got -1"),
        ("203.0.113.7", 0, "--host: cannot listen on '203.0.113.7'"),
        ("no such host", 0, "--host: cannot listen on 'no such host'"),
    ],
)
def test_an_impossible_address_names_its_flag(host: str, port: int, words: str) -> None:
    with pytest.raises(UsageProblem, match=words):
        free_http_port(host, port, flag="--http-port")


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("gpu7.example", "gpu7.example")],
)
def test_a_wildcard_is_reached_over_the_loopback(host: str, reached: str) -> None:
    assert connect_host(host) == reached


def test_a_plan_wires_every_service_to_the_ports_it_reserved(tmp_path: Path) -> None:
    plan = plan_stack(StackOptions(tmp_path, tmp_path / "weights", grpc_port=0, http_port=0, device="cpu"))
    arguments = dict(zip(plan.gateway.command[4::2], plan.gateway.command[5::2], strict=True))
    for stage in plan.stages:
        flags = dict(zip(stage.command[4::2], stage.command[5::2], strict=True))
        assert arguments[f"--{stage.name.replace('_', '-')}"] == stage.address == f"127.0.0.1:{flags['--port']}"
        assert flags["--checkpoints"] == str(tmp_path / "weights")
        assert flags["--device"] == ("auto" if stage.name == "text_encoder" else "cpu")
    assert plan.grpc_address == f"127.0.0.1:{arguments['--grpc-port']}"
    assert len({plan.gateway.address, *(stage.address for stage in plan.stages)}) == 4
    for spec in (plan.gateway, *plan.stages):
        assert spec.environment["MALLOC_MMAP_THRESHOLD_"] == "33554432"
        assert spec.grace_s > plan.options.grace_s
    plan.close()


def test_a_plan_that_fails_keeps_no_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        options = StackOptions(tmp_path, tmp_path, grpc_port=number - 1, http_port=0)
        with pytest.raises(UsageProblem, match=rf"--grpc-port.*port {number} is taken"):
            plan_stack(options)
    with socket.socket() as again:
        again.bind(("127.0.0.1", number - 1))


def test_one_stack_a_data_folder(tmp_path: Path) -> None:
    with locked_data_dir(tmp_path):
        write_json(tmp_path / STACK_FILE, {"grpc_address": "127.0.0.1:4711", "supervisor_pid": 12})
        running = live_stack(tmp_path)
        assert running is not None and running["grpc_address"] == "127.0.0.1:4711"
        with pytest.raises(UsageProblem, match=r"in use by another stack \(gRPC at 127\.0\.0\.1:4711, process 12\)"):
            locked_data_dir(tmp_path).__enter__()
    assert live_stack(tmp_path) is None, "a file left behind by a killed stack is not a running stack"
    with locked_data_dir(tmp_path):
        assert live_stack(tmp_path) is None, "nor is it the one that starts now"


def test_an_unusable_data_folder_names_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageProblem, match=r"--data-dir: .* cannot be written"):
        locked_data_dir(tmp_path / "file" / "data").__enter__()


def _release(folder: Path) -> Path:
    weights = folder / VARIANTS["960x960_10s"].file
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    return folder


def test_checkpoints_named_are_used_and_must_hold_weights(tmp_path: Path) -> None:
    assert choose_checkpoints(_release(tmp_path / "here"), None, tmp_path, pytest.fail) == tmp_path / "here"
    with pytest.raises(UsageProblem, match=r"--checkpoints: .*nowhere holds none of"):
        choose_checkpoints(tmp_path / "nowhere", None, tmp_path, pytest.fail)
    with pytest.raises(UsageProblem, match="exclude each other"):
        choose_checkpoints(tmp_path / "here", "tiny", tmp_path, pytest.fail)
    with pytest.raises(UsageProblem, match="--preset: got 'huge'"):
        choose_checkpoints(None, "huge", tmp_path, pytest.fail)


def test_checkpoints_of_the_working_folder_come_before_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _release(tmp_path / "checkpoints")
    assert choose_checkpoints(None, None, tmp_path / "data", pytest.fail) == tmp_path / "checkpoints"


def test_the_tiny_model_is_made_once_and_its_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    folder = choose_checkpoints(None, None, tmp_path / "data", said.append)
    assert holds_release(folder)
    assert len(said) == 2 and "noise" in said[0] and str(folder) in said[1]
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert choose_checkpoints(None, "tiny", tmp_path / "data", pytest.fail) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    assert list(folder.parent.iterdir()) == [folder], "nothing half-made is left beside it"
