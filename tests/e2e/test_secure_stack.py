"""`ovi up` with a certificate and API keys, and the command against it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.certificates import Authority
from tests.e2e.conftest import OVI, Program, RunningStack, start_stack

COMMAND_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secure")


@pytest.fixture(scope="module")
def authority(folder) -> Authority:
    return Authority(folder, "authority")


@pytest.fixture(scope="module")
def stack(folder, authority) -> Iterator[RunningStack]:
    """Its certificate is for a name under which nobody on this machine calls it, but also for the loopback."""
    pair = authority.issue("gateway.example.com", "127.0.0.1")
    files = ("--tls-cert", pair.cert, "--tls-key", pair.key)
    with contextlib.closing(start_stack(folder / "data", "--preset", "tiny", *files, "--require-keys")) as running:
        yield running


def ovi(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OVI_")}
    command = [str(argument) for argument in (OVI, *arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment | variables, text=True, capture_output=True, timeout=COMMAND_S, check=False
    )


def test_a_clip_over_tls_with_a_key(stack, folder, authority):
    stack.program.line_with("https://")
    stack.program.line_with("ovi keys create NAME")
    key = ovi(folder, "keys", "create", "me", "--data-dir", stack.data_dir).stdout.strip()
    without = ovi(folder, "generate", "a bell", "--data-dir", stack.data_dir, "--steps", "2")
    assert without.returncode == 1 and "this gateway asks for an API key" in without.stderr
    made = ovi(folder, "generate", "a bell", "--data-dir", stack.data_dir, "--steps", "2", OVI_API_KEY=key)
    assert made.returncode == 0 and (folder / "clip.mp4").read_bytes()[4:8] == b"ftyp", made.stderr

    named = ("--server", stack.address, "--tls-ca", authority.file, "--api-key", key)
    listed = ovi(folder, "jobs", "list", *named)
    assert listed.returncode == 0 and "a bell" in listed.stdout, listed.stderr
    plain = ovi(folder, "jobs", "list", "--server", stack.address, "--api-key", key)
    assert plain.returncode == 1 and "cannot be used now" in plain.stderr
    with httpx.Client(base_url=stack.info["http_url"], verify=authority.context()) as client:
        assert client.get("/api/jobs").status_code == 401
        mine = client.get("/v1/videos", headers={"authorization": f"Bearer {key}"}).json()
    assert [video["status"] for video in mine["data"]] == ["completed"]
    health = ovi(folder, "health", stack.address, "--tls-ca", authority.file)
    assert health.returncode == 0 and "SERVING" in health.stdout, health.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines reach this"),
        (["--tls-cert", "nowhere.pem"], "--tls-cert needs --tls-key"),
        (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.key"], "--tls-cert"),
    ],
)
def test_a_stack_that_would_be_open_does_not_start(program, flags, words):
    started: Program = program(OVI, "up", "--grpc-port", "0", "--http-port", "0", "--preset", "tiny", *flags)
    assert started.wait() == 2
    assert words in started.output and "Ready" not in started.output


def test_a_key_does_not_travel_readable(folder):
    sent = ovi(folder, "jobs", "list", "--server", "10.0.0.1:50050", OVI_API_KEY="ovi_x")
    assert sent.returncode == 2 and "without TLS everybody on the way could read the API key" in sent.stderr
