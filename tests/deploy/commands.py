"""The commands of deployment files, given to the parsers that would parse them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from shared.places import Name, split_address
from shared.tensors.transport import TensorResolver

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("torch.distributed.run", "shared.group.launch")
"""torchrun, and around it the one for ranks of one host; both take torchrun's arguments."""
ADMIN_KEY = "0123456789abcdef0123456789abcdef"
CONSUMERS = {
    "fusion": ("text_encoder", "vae", "gateway"),
    "vae": ("fusion", "gateway"),
    "gateway": ("fusion",),
}
"""Who fetches tensors from whom."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """As Kubernetes expands $(NAME) in arguments."""
    return re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], text)


def resolve(command: Sequence[str], monkeypatch: pytest.MonkeyPatch, secrets: Path) -> tuple[str, Any]:
    """The service and the options to which its own `main` resolves a command; whatever it refuses is raised.

    Args:
        command: what `python -P -m` is given.
        monkeypatch: of the test.
        secrets: folder for the administrator's key.
    """
    module, *arguments = command
    if module in LAUNCHERS:
        launch = get_args_parser().parse_args(arguments)
        assert launch.module and launch.nproc_per_node in ("gpu", "8"), "torchrun runs a module, a rank a GPU"
        module, arguments = launch.training_script, launch.training_script_args
    key = secrets / "admin_key"
    key.write_text(ADMIN_KEY)
    arguments = [re.sub(r"^(--admin-key-file=).*", rf"\g<1>{key}", argument) for argument in arguments]
    resolved: list[Any] = []

    def take(service: str, level: str, options: Any, main: Coroutine[Any, Any, None], ranks: object = None) -> None:
        main.close()
        resolved.append(options)

    service = importlib.import_module(f"{module}.__main__")
    with monkeypatch.context() as patched:
        patched.setattr(service, "run_service", take)
        if hasattr(service, "configure_logging"):  # this process keeps its own
            patched.setattr(service, "configure_logging", lambda *_, **__: None)
        patched.setattr(sys, "argv", [module, *arguments])
        service.main()
    (options,) = resolved
    return module.removeprefix("services."), options


def check_stack(options: Mapping[str, Any]) -> None:
    """That services of a stack find each other: addresses, ports, and whose tensors they accept.

    Args:
        options: resolved, by service.
    """
    gateway = options["gateway"]
    for name, places in gateway.stages.by_stage.items():
        stage = options[name].stage
        hosts, domains = set(), set()
        for place in places.given:
            host, port = (place.host, place.port) if isinstance(place, Name) else split_address(place.address)
            assert port == stage.listen.port, f"{name} is called at {place}"
            # Pods behind a name have names of their own below it.
            (domains if isinstance(place, Name) else hosts).add(host)
        known = stage.advertise_host in hosts or stage.advertise_host.partition(".")[2] in domains
        assert known, f"{name} says that it is {stage.advertise_host}, it is called at {hosts | domains}"
        assert stage.data_port, f"{name} has a data port that a firewall can know"
    for consumer, producers in CONSUMERS.items():
        accepted = gateway.producer_hosts if consumer == "gateway" else options[consumer].stage.producer_hosts
        resolver = TensorResolver.over_grpc(accepted)
        for producer in producers:
            host = gateway.advertise_host if producer == "gateway" else options[producer].stage.advertise_host
            assert resolver.accepts(host), f"{consumer} does not fetch from {producer} at {host}: {accepted}"
        resolver.close()
