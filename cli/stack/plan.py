"""What a stack consists of: commands, ports, environment, files. Pure, but for the ports it reserves."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli.stack.ports import ReservedPort, connect_host, free_http_port, reserve_grpc_port
from shared.allocations import MAX_VAE_RANKS
from shared.memory.modes import RECIPES, TextEncoderPlace, VramMode
from shared.memory.stack import StackMemory

STAGES = ("text_encoder", "fusion", "vae")
GATEWAY = "gateway"

_LOOPBACK = "127.0.0.1"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_RESTARTS = ("--max-restarts", "1000", "--monitor-interval", "0.2")
"""torchrun starts all ranks again when one fails; when it gives up, the supervisor starts torchrun again."""
ENVIRONMENT = {
    # glibc would map and unmap memory for every large message, which makes protobuf 10 to 25 times slower.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "536870912",
    # Memory of a GPU that comes and goes in sizes of many kinds leaves fewer pieces that fit nothing.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # Threads that spin while they wait take the cores from the other services, up to 20 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class StackSecurity:
    """What protects the gateway's ports."""

    tls_cert: Path | None = None
    """PEM certificate; None: plain text."""
    tls_key: Path | None = None
    insecure: bool = False
    """Plain text also beyond the loopback."""
    keys_required: bool = False
    """API keys also on the loopback."""
    admin_key_file: Path | None = None
    """A key that administers, besides those in the database."""

    def flags(self) -> list[str]:
        """For the gateway."""
        flags = ["--insecure"] if self.insecure else []
        flags += ["--auth", "required"] if self.keys_required else []
        for flag, path in (
            ("--tls-cert", self.tls_cert),
            ("--tls-key", self.tls_key),
            ("--admin-key-file", self.admin_key_file),
        ):
            flags += [flag, str(path)] if path is not None else []
        return flags


OPEN = StackSecurity()


@dataclass(frozen=True)
class StackOptions:
    """The flags of `ovi up`, resolved."""

    data_dir: Path
    """Folder of the database, clips, logs."""
    checkpoints: Path
    """Folder in the released layout."""
    host: str = _LOOPBACK
    """Interface of the gateway; the stages listen on the loopback alone."""
    grpc_port: int = 50050
    """Of the gateway; the stages take the next three. 0 picks free ones for all."""
    http_port: int = 8000
    """0 picks a free one."""
    device: str = "auto"
    """Of fusion and vae: auto, cpu, cuda, cuda:N."""
    text_encoder_device: str = "auto"
    gpus: int = 1
    """GPUs of the fusion service, a rank each; the text encoder uses the first."""
    vae_gpus: int | None = None
    """GPUs of the VAE service, a rank each; None: those of the fusion service, at most MAX_VAE_RANKS, on a CPU 1."""
    plan: str = "auto"
    """How the GPUs of the fusion service share the work: one of shared.allocations.ALLOCATIONS."""
    vram_mode: VramMode = VramMode.AUTO
    """How device memory is used; AUTO: each service chooses by what it finds free."""
    memory: StackMemory | None = None
    """What was planned for these GPUs; None: nothing limits the services' memory."""
    grace_s: float = 10.0
    """Seconds that calls under way have to end when the stack stops."""
    security: StackSecurity = OPEN
    """Of the gateway's ports; the stages listen on the loopback alone."""

    @property
    def vae_ranks(self) -> int:
        """Processes of the VAE service."""
        if self.vae_gpus is not None:
            return self.vae_gpus
        return 1 if self.device == "cpu" else min(self.gpus, MAX_VAE_RANKS)


@dataclass(frozen=True)
class ServiceSpec:
    """One process of the stack."""

    name: str
    command: tuple[str, ...]
    """Program (an absolute path) and arguments."""
    address: str
    """host:port at which its gRPC health service is reached."""
    log_path: Path
    grace_s: float
    """Seconds between SIGTERM and SIGKILL."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the supervisor's own."""
    tls_cert: Path | None = None
    """Certificate that it shows; None: plain text."""


@dataclass
class StackPlan:
    """Every process of a stack in the order in which they stop, and the ports kept for them."""

    options: StackOptions
    gateway: ServiceSpec
    stages: tuple[ServiceSpec, ...]
    grpc_address: str
    """host:port of the gateway's gRPC API, as reached from this machine."""
    http_url: str
    ports: contextlib.ExitStack

    def close(self) -> None:
        """Give the reserved ports back."""
        self.ports.close()


def plan_stack(options: StackOptions) -> StackPlan:
    """Choose and reserve ports and write out every command.

    Raises:
        UsageProblem: a port is taken; names it and the flag.
    """
    with contextlib.ExitStack() as reserved:

        def reserve(host: str, offset: int) -> int:
            port = options.grpc_port + offset if options.grpc_port else 0
            flag = f"--grpc-port (+{offset} for a stage)" if offset else "--grpc-port"
            kept: ReservedPort = reserve_grpc_port(host, port, flag=flag)
            reserved.callback(kept.close)
            return kept.number

        grpc_port = reserve(options.host, 0)
        stage_ports = {name: reserve(_LOOPBACK, offset) for offset, name in enumerate(STAGES, start=1)}
        http_port = free_http_port(options.host, options.http_port, flag="--http-port")
        reached = connect_host(options.host)
        grpc_address = f"{reached}:{grpc_port}"
        stages = tuple(_stage(options, name, port) for name, port in stage_ports.items())
        arguments = ["--data-dir", str(options.data_dir), "--host", options.host]
        arguments += ["--grpc-port", str(grpc_port), "--http-port", str(http_port), "--grace-s", str(options.grace_s)]
        for stage in stages:
            arguments += [f"--{stage.name.replace('_', '-')}", stage.address]
        security = options.security
        gateway = _service(options, GATEWAY, grpc_address, [*arguments, *security.flags()])
        gateway = replace(gateway, tls_cert=security.tls_cert)
        scheme = "https" if security.tls_cert is not None else "http"
        http_url = f"{scheme}://{reached}:{http_port}"
        return StackPlan(options, gateway, stages, grpc_address, http_url, reserved.pop_all())


def _stage(options: StackOptions, name: str, port: int) -> ServiceSpec:
    device = options.text_encoder_device if name == "text_encoder" else options.device
    arguments = ["--checkpoints", str(options.checkpoints), "--host", _LOOPBACK, "--port", str(port)]
    arguments += ["--device", device, "--grace-s", str(options.grace_s)]
    arguments += ["--vram-mode", _mode(options, name).value]
    if options.memory is not None and (budget := options.memory.budgets.get(name)):
        # Rounded down, since together they may not be more than there is.
        arguments += ["--memory-gib", f"{budget * 1000 // 2**30 / 1000:.3f}"]
    ranks = {"fusion": options.gpus, "vae": options.vae_ranks}.get(name, 1)
    if name == "fusion":
        arguments += ["--plan", options.plan]
    return _service(options, name, f"{_LOOPBACK}:{port}", arguments, ranks)


def _mode(options: StackOptions, name: str) -> VramMode:
    """Of a stage: the stack's, but for a text encoder that gives way so that the others can have it."""
    memory = options.memory
    if name != "text_encoder" or memory is None or RECIPES[memory.mode].text_encoder is memory.text_encoder.place:
        return options.vram_mode
    return VramMode.STREAMED if memory.text_encoder.place is TextEncoderPlace.STREAMED else options.vram_mode


def _service(options: StackOptions, name: str, address: str, arguments: list[str], ranks: int = 1) -> ServiceSpec:
    # -P: a folder called "services" where the user happens to be must not be run instead of ours.
    launcher = ("-m", "shared.group.launch", "--nproc-per-node", str(ranks), *_RESTARTS)
    command = (sys.executable, "-P", *(launcher if ranks > 1 else ()), "-m", f"services.{name}", *arguments)
    log_path = options.data_dir / "logs" / f"{name}.log"
    environment = ENVIRONMENT | _visible_gpus(options.memory)
    return ServiceSpec(name, command, address, log_path, options.grace_s + 5, environment)


def _visible_gpus(memory: StackMemory | None) -> dict[str, str]:
    """Ranks take GPUs in the order in which they see them, so of several they shall see those that were chosen."""
    if memory is None or memory.gpus == tuple(range(len(memory.gpus))) or len(memory.gpus) == 1:
        return {}
    seen = os.environ.get(_VISIBLE)
    names = seen.split(",") if seen else [str(index) for index in range(max(memory.gpus) + 1)]
    return {_VISIBLE: ",".join(names[index] for index in memory.gpus)}
