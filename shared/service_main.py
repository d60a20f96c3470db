"""What every stage's `__main__` does alike: flags, logging, serving, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import EXIT_BAD_CONFIG, CheckpointError, OutOfMemory
from shared.group.ranks import Ranks, end_torchrun
from shared.grpc_server import ListenConfig
from shared.logging import configure_logging, get_logger
from shared.memory.modes import VramMode
from shared.registration import Announcer, Registration, add_registration_flags, registration_of
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import LOOPBACK_HOSTS
from shared.tls import Tls, add_tls_flags, require_protection

log = get_logger(__name__)

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StageOptions:
    """Flags that all stages share, resolved."""

    listen: ListenConfig
    data_port: int
    """Port of the TensorService; 0 picks a free one."""
    advertise_host: str
    """Name under which other services reach this one's data port."""
    producer_hosts: frozenset[str]
    """Hosts whose tensor references are accepted."""
    checkpoints: Path
    """Folder in the released layout."""
    device: torch.device
    precision: torch.dtype
    """Arithmetic of the networks."""
    lease_s: float
    """How long a produced tensor is kept unless released before."""
    tensor_store_bytes: int
    """Most bytes of produced tensors held at once."""
    max_pending: int
    """Most calls waiting for or using the device; further ones get RESOURCE_EXHAUSTED."""
    vram_mode: VramMode
    """How device memory is used."""
    memory_bytes: int | None
    """Most bytes of the device that this process may reserve; None: what is free when it starts."""
    registration: Registration | None = None
    """With which gateways this worker registers; None: they know it by themselves."""

    def tensor_server(self, store: TensorStore) -> TensorServer:
        """A TensorService on this stage's data port.

        Raises:
            RuntimeError: the port is taken.
        """
        listen = self.listen
        return TensorServer(
            store, host=listen.host, port=self.data_port, advertise_host=self.advertise_host, tls=listen.tls
        )

    def announcer(self, stage: str) -> Callable[[int], Coroutine[Any, Any, None]] | None:
        """What registers this worker while it serves, for `serve`; None if it registers nowhere."""
        if self.registration is None:
            return None
        return Announcer(stage, self.advertise_host, self.registration).run


def stage_parser(service: str, default_port: int) -> argparse.ArgumentParser:
    """A parser with the flags that all stages share; a stage adds its own."""
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}")
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True, help="folder in the released layout")
    add("--host", default="127.0.0.1", help="interface to listen on (default: loopback only)")
    add("--port", type=int, default=default_port, help="control port (default: %(default)s)")
    add("--data-port", type=int, default=0, help="tensor port; 0 picks a free one (default: %(default)s)")
    add("--advertise-host", default=None, help="name other services use for this host (default: --host)")
    add("--producer-hosts", default="", help="hosts whose tensors are accepted, besides loopback; *.name: all below it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--precision", default="auto", choices=["auto", *_PRECISIONS], help="auto: bfloat16 on CUDA, float32 on CPU")
    add("--lease-s", type=float, default=900.0, help="seconds a produced tensor is kept (default: %(default)s)")
    add("--tensor-store-gib", type=float, default=4.0, help="most GiB of produced tensors held (default: %(default)s)")
    add("--max-pending", type=int, default=16, help="most calls waiting for the device (default: %(default)s)")
    modes = [mode.value for mode in VramMode]
    add("--vram-mode", default="auto", choices=modes, help="how device memory is used (default: %(default)s)")
    add("--memory-gib", type=float, default=None, help="most GiB of the device to reserve (default: what is free)")
    add_tls_flags(parser)
    add("--tls-ca", type=Path, help="PEM authority of the services whose tensors are fetched, which then is by TLS")
    add_registration_flags(parser)
    add("--grace-s", type=float, default=20.0, help="seconds to drain after SIGTERM (default: %(default)s)")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def stage_options(args: argparse.Namespace) -> StageOptions:
    """Resolve parsed flags.

    Raises:
        SystemExit: a device that is not there, certificates or gateways that cannot be used, or no certificates where
            they are needed.
    """
    device = resolve_device(args.device)
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tls = Tls(args.tls_cert, args.tls_key, args.tls_client_ca, args.tls_ca)
        require_protection("--host", args.host, tls, insecure=args.insecure)
        registration = registration_of(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    extra = {host.strip() for host in args.producer_hosts.split(",") if host.strip()}
    return StageOptions(
        listen=ListenConfig(args.host, args.port, args.grace_s, tls),
        data_port=args.data_port,
        advertise_host=args.advertise_host or args.host,
        producer_hosts=LOOPBACK_HOSTS | extra,
        checkpoints=args.checkpoints,
        device=device,
        precision=_PRECISIONS.get(args.precision, auto),
        lease_s=args.lease_s,
        tensor_store_bytes=int(args.tensor_store_gib * 2**30),
        max_pending=args.max_pending,
        vram_mode=VramMode(args.vram_mode),
        memory_bytes=None if args.memory_gib is None else int(args.memory_gib * 2**30),
        registration=registration,
    )


def resolve_device(name: str) -> torch.device:
    """The device a flag names; `auto` is the first GPU if there is one.

    Raises:
        SystemExit: unknown, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SystemExit(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    elif device.type != "cpu":
        raise SystemExit(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def device_name(device: torch.device) -> str:
    """For people: "cpu", or "cuda:0 NVIDIA H200"."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def run_service(
    service: str, log_level: str, options: Any, main: Coroutine[Any, Any, None], ranks: Ranks | None = None
) -> None:
    """Run a service's coroutine to its end; logs the resolved options first.

    Args:
        service: its name in the log.
        log_level: the least level that is logged.
        options: a dataclass.
        main: what is run.
        ranks: this process among those of its group, if the service can have one.

    Raises:
        SystemExit: see `refusing_bad_checkpoints`.
    """
    configure_logging(service, level=log_level)
    log.info("starting", options={key: str(value) for key, value in asdict(options).items()})
    with refusing_bad_checkpoints(ranks):
        asyncio.run(main)


@contextlib.contextmanager
def refusing_bad_checkpoints(ranks: Ranks | None = None) -> Iterator[None]:
    """Around a service's whole run. A group of several ranks is not started again: the file would be the same.

    Raises:
        SystemExit: EXIT_BAD_CONFIG with the reason in the log if a weight file does not fit the model, or the model the
            memory.
    """
    try:
        yield
    except (CheckpointError, OutOfMemory) as error:
        log.error("cannot start", reason=error.message)
        if ranks is not None and ranks.world_size > 1:
            end_torchrun()
        raise SystemExit(EXIT_BAD_CONFIG) from None
