"""`ovi doctor`: what this machine can do, what is missing, and what to do about it."""

from __future__ import annotations

import enum
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import flags
from cli.errors import EXIT_FAILED, UsageProblem
from cli.profiles import CLIPS
from cli.stack.checkpoints import DEFAULT_FOLDER, holds_release
from cli.stack.plan import STAGES
from cli.stack.ports import free_http_port, reserve_grpc_port
from cli.stack.stack import live_stack
from shared.errors import OutOfMemory
from shared.memory.choose import DeviceFacts
from shared.memory.modes import RECIPES
from shared.memory.sizes import RELEASED
from shared.memory.stack import plan_stack

_PACKAGES = ("ovi-serve", "torch", "transformers", "diffusers", "grpcio", "protobuf", "dbos", "av")
_MIN_FREE_BYTES = 2 << 30


class Verdict(enum.StrEnum):
    """How serious a finding is."""

    GOOD = "good"
    NOTE = "note"
    BAD = "bad"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what, how it is, what to do if it is not good."""

    subject: str
    verdict: Verdict
    state: str
    advice: str = ""


def doctor(
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR,
    checkpoints: flags.Checkpoints = None,
    grpc_port: flags.GrpcPort = 50050,
    http_port: flags.HttpPort = 8000,
    as_json: flags.Json = False,
) -> None:
    """Look at Python, packages, GPUs, attention kernels, weights, ports, disk and tools, and say what to do.

    Exit status: 0 if `ovi up` can work, else 1.
    """
    findings = [
        *_python(),
        *_packages(),
        *_devices(live_stack(data_dir.resolve()) is not None),
        *_attention(),
        *_weights(checkpoints),
        *_ports(data_dir.resolve(), grpc_port, http_port),
        *_disk(data_dir.resolve()),
        *_tools(),
    ]
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(asdict(finding)))
    else:
        _print(findings)
    if any(finding.verdict is Verdict.BAD for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _print(findings: list[Finding]) -> None:
    marks = {Verdict.GOOD: Text("✓", "green"), Verdict.NOTE: Text("!", "yellow"), Verdict.BAD: Text("✗", "red")}
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        state = Text(finding.state)
        if finding.advice:
            state.append(f"\n{finding.advice}", style="yellow")
        table.add_row(marks[finding.verdict], finding.subject, state)
    Console(highlight=False).print(table)


def _python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    verdict = Verdict.GOOD if supported else Verdict.BAD
    advice = "" if supported else "use Python 3.11 or 3.12: make clean setup PYTHON=python3.12"
    yield Finding("Python", verdict, f"{platform.python_version()} at {sys.executable}", advice)
    yield Finding("machine", Verdict.GOOD, f"{platform.platform()}, {os.cpu_count()} cores, {_memory()}")


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{_gib(memory.available)} of {_gib(memory.total)} memory free"


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding(name, Verdict.GOOD, version(name))
        except PackageNotFoundError:
            yield Finding(name, Verdict.BAD, "not installed", "make setup")
    if importlib.util.find_spec("ovi") is None:
        yield Finding("gRPC stubs", Verdict.BAD, "not generated", "make protos")


def _devices(in_use: bool) -> Iterator[Finding]:
    import torch

    from shared.memory.devices import Devices

    states = [device for device in Devices().look() if device.facts is not None]
    if not states:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "GPU",
            Verdict.NOTE,
            f"none usable (torch is {built})",
            "the tiny model runs on the CPU; the release needs one",
        )
        return
    for device in states:
        memory = f"{_gib(device.free_bytes)} of {_gib(device.total_bytes)} free"
        what = [device.model, memory, f"capability {device.capability or 'unknown'}"]
        what += ["memory shared with the host"] if device.unified else []
        yield Finding(device.name, Verdict.GOOD, ", ".join([*what, *device.links]))
    if in_use:
        yield Finding("memory modes", Verdict.GOOD, "not planned now: what the running stack takes is not free")
        return
    facts = [device.facts for device in states if device.facts is not None]
    for gpu in facts:
        yield from memory_findings([gpu], psutil.virtual_memory().available)
    if len(facts) > 1:
        yield from memory_findings(facts, psutil.virtual_memory().available)


def memory_findings(gpus: Sequence[DeviceFacts], host_bytes: int) -> Iterator[Finding]:
    """What `--vram-mode auto` would choose on these GPUs for each released variant, by the memory that is free now.

    Args:
        gpus: for one stack.
        host_bytes: memory of the host that can be had.
    """
    where = gpus[0].name if len(gpus) == 1 else f"{len(gpus)} GPUs"
    for clip in CLIPS:
        subject = f"{where} {clip.name}"
        try:
            plan = plan_stack(gpus, RELEASED, [clip])
        except OutOfMemory as error:
            yield Finding(subject, Verdict.NOTE, error.message, "free its memory, or use a larger GPU or several")
            continue
        advice = [] if RECIPES[plan.mode].lossless else ["lossy: results differ from those of the released weights"]
        if plan.host_bytes > host_bytes:
            kept = f"{_gib(plan.host_bytes)} of weights stay in the host's memory, which has {_gib(host_bytes)} free"
            advice.append(kept)
        yield Finding(subject, Verdict.NOTE if advice else Verdict.GOOD, plan.explanation, "; ".join(advice))


def _attention() -> Iterator[Finding]:
    import torch

    kernels = ["torch SDPA"]
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        kernels.append("cuDNN")
    for name, module in (("flash-attn 3", "flash_attn_interface"), ("flash-attn 2", "flash_attn")):
        if importlib.util.find_spec(module) is not None:
            kernels.append(name)
    yield Finding("attention", Verdict.GOOD, ", ".join(kernels))


def _weights(checkpoints: Path | None) -> Iterator[Finding]:
    folder = checkpoints or DEFAULT_FOLDER
    if not holds_release(folder):
        advice = "put the release there, or make a folder with `ovi models synth`; until then the tiny model is used"
        verdict = Verdict.NOTE if checkpoints is None else Verdict.BAD
        yield Finding("weights", verdict, f"{folder} holds no weights", advice)
        return
    from cli.checkpoints.check import check_folder

    report = check_folder(folder)
    if report.complete:
        yield Finding("weights", Verdict.GOOD, f"{folder}: {report.summary}")
    else:
        yield Finding("weights", Verdict.BAD, f"{folder}: {report.summary}", f"ovi models check {folder}")


def _ports(data_dir: Path, grpc_port: int, http_port: int) -> Iterator[Finding]:
    running = live_stack(data_dir)
    if running is not None:
        yield Finding("stack", Verdict.GOOD, f"runs at {running['grpc_address']}, {running['http_url']}")
        return
    wanted = {f"port {grpc_port + offset}": grpc_port + offset for offset in range(len(STAGES) + 1) if grpc_port}
    for subject, port in wanted.items():
        try:
            reserve_grpc_port("127.0.0.1", port, flag="--grpc-port").close()
            yield Finding(subject, Verdict.GOOD, "free")
        except UsageProblem as problem:
            yield Finding(subject, Verdict.BAD, "taken", str(problem))
    try:
        free_http_port("127.0.0.1", http_port, flag="--http-port")
        yield Finding(f"port {http_port}", Verdict.GOOD, "free (HTTP)")
    except UsageProblem as problem:
        yield Finding(f"port {http_port}", Verdict.BAD, "taken (HTTP)", str(problem))


def _disk(data_dir: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (data_dir, *data_dir.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield Finding("data folder", Verdict.BAD, f"{data_dir} cannot be written", "choose another with --data-dir")
    elif free < _MIN_FREE_BYTES:
        yield Finding("data folder", Verdict.NOTE, f"{data_dir}, {_gib(free)} free", "delete old jobs, or move it")
    else:
        yield Finding("data folder", Verdict.GOOD, f"{data_dir}, {_gib(free)} free")


def _tools() -> Iterator[Finding]:
    found = shutil.which("ffprobe")
    if found:
        yield Finding("ffprobe", Verdict.GOOD, found)
    else:
        yield Finding("ffprobe", Verdict.NOTE, "not on PATH", "only the tests want it; make test fetches one")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.0f} GiB"
