"""The Dockerfile: what it copies is there, and the wheel that it builds has every file of the services."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cli.stack.plan import ENVIRONMENT
from shared.memory.turns import DeviceTurns
from tests.deploy.commands import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PACKAGES = ("shared", "services", "cli")


def ignored_but() -> set[str]:
    """What .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def copied() -> set[str]:
    """Sources of every COPY of the build's context."""
    lines = re.findall(r"^COPY ((?!--from).+)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    assert copied() == ignored_but()
    assert all((ROOT / source).exists() for source in copied())


def test_versions_are_pinned_and_the_same_as_elsewhere() -> None:
    assert re.search(r"^ARG PYTHON=python:3\.1[12]\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    torch = re.search(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE)
    makefile = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch and makefile and torch[1] == makefile[1]


def test_it_runs_as_nobody_in_particular_in_the_environment_of_ovi_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = DOCKERFILE[DOCKERFILE.index(" AS run") :]
    assert re.search(r"^USER 10001:10001$", run, re.MULTILINE)
    for name, value in ENVIRONMENT.items():
        assert f"{name}={value}" in run
    monkeypatch.setattr("os.getuid", lambda: 10001)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nowhere")
    with pytest.raises(FileNotFoundError, match="/nowhere/ovi-turns-10001"):
        DeviceTurns("GPU-0")
    assert "/tmp/ovi-turns-10001" in run, "a volume there has the owner of this folder"


def test_the_wheel_has_every_file_of_the_services(tmp_path: Path) -> None:
    """Built as the build stage does, from what it copies."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in copied():
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(path, source / name)
    protos = [str(path.relative_to(source)) for path in source.glob("protos/**/*.proto")]
    stubs = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", "--python_out=.", "--grpc_python_out=."]
    subprocess.run([*stubs, *protos], cwd=source, check=True, timeout=60)
    for folder in [source / "ovi", *(path for path in (source / "ovi").rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(wheels), "."], cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {
        str(path.relative_to(source)) for name in PACKAGES for path in (source / name).rglob("*") if path.is_file()
    }
    assert wanted - packed == set()
    assert {f"ovi/{name}/v1/{name}_pb2_grpc.py" for name in ("gateway", "fusion", "vae", "text_encoder")} <= packed
    assert not {name for name in packed if name.startswith(("tests", "benchmarks"))}
