"""How the command reaches a gateway: its certificates and its API key, from flags or the environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import typer
from typer.core import TyperGroup

from cli.errors import UsageProblem
from shared.tls import PLAIN, Tls, common_name, is_loopback, open_channel

_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
_WITH_VALUE = ("--api-key", "--tls-ca", "--tls-cert", "--tls-key")
_SWITCHES = ("--tls", "--insecure")
_WITH_THEIR_OWN = ("up",)
"""Commands to which certificates mean something else: those of the gateway that they start."""

ApiKey = Annotated[
    str | None,
    typer.Option(envvar="OVI_API_KEY", help="API key; the variable keeps it out of lists of processes."),
]
WithTls = Annotated[bool, typer.Option("--tls", envvar="OVI_TLS", help="Connect with TLS; trust public authorities.")]
TlsCa = Annotated[Path | None, typer.Option(envvar="OVI_TLS_CA", help="Connect with TLS; trust this authority (PEM).")]
TlsCert = Annotated[
    Path | None, typer.Option(envvar="OVI_TLS_CERT", help="Own certificate, for a gateway that asks for one (PEM).")
]
TlsKey = Annotated[Path | None, typer.Option(envvar="OVI_TLS_KEY", help="Its private key.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", envvar="OVI_INSECURE", help="Send the API key to other machines without TLS.")
]


@dataclass(frozen=True)
class Connection:
    """How to reach a gateway."""

    tls: Tls = PLAIN
    api_key: str = field(default="", repr=False)
    insecure: bool = False
    """The key may travel readable."""
    asked_name: str = ""
    """Name that the gateway's certificate must be for, if not that of the address."""

    @classmethod
    def of_own_stack(cls, tls_cert: Path | None, api_key: str = "") -> Connection:
        """To a gateway of this machine that shows this very certificate, whatever name it is for.

        Raises:
            ValueError: the certificate cannot be used.
        """
        if tls_cert is None:
            return cls(api_key=api_key)
        return cls(Tls(ca=tls_cert), api_key, asked_name=common_name(tls_cert))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def open(self, server: str) -> grpc.aio.Channel:
        """A channel to a gateway.

        Args:
            server: host:port.

        Raises:
            UsageProblem: the key would travel readable.
        """
        host = server.rpartition(":")[0]
        if self.api_key and not self.tls.connects and not self.insecure and not is_loopback(host):
            raise UsageProblem(
                f"--server {server}: without TLS everybody on the way could read the API key;"
                " add --tls-ca FILE or --tls, or --insecure for a network that you trust"
            )
        options: Sequence[tuple[str, Any]] = _OPTIONS
        if self.asked_name:
            options = [*_OPTIONS, ("grpc.ssl_target_name_override", self.asked_name)]
        return open_channel(server, self.tls, options)


_chosen = Connection()


def choose_connection(
    api_key: str | None, with_tls: bool, ca: Path | None, cert: Path | None, key: Path | None, insecure: bool
) -> None:
    """Resolve the flags, once, for all that this command connects to.

    Raises:
        UsageProblem: files that cannot be used, or a key that cannot be sent.
    """
    global _chosen
    if api_key and (not api_key.isascii() or not api_key.isprintable()):
        raise UsageProblem("--api-key: has characters that no key has; was it copied whole?")
    try:
        tls = Tls(cert, key, ca=ca, public=with_tls and ca is None)
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    _chosen = Connection(tls, api_key or "", insecure)


def chosen_connection() -> Connection:
    """What the flags and the environment say."""
    return _chosen


class ConnectionFlagsAnywhere(TyperGroup):
    """Takes the flags of the connection before or after the name of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put them first, where they are declared."""
        return super().parse_args(ctx, _connection_flags_first(args))


def _connection_flags_first(args: list[str]) -> list[str]:
    first: list[str] = []
    rest: list[str] = []
    command = ""
    remaining = iter(args)
    for argument in remaining:
        if argument == "--" or command in _WITH_THEIR_OWN:
            return [*first, *rest, argument, *remaining]
        name = argument.partition("=")[0]
        if argument in _SWITCHES or (name in _WITH_VALUE and "=" in argument):
            first.append(argument)
        elif argument in _WITH_VALUE:
            first += [argument, *([value] if (value := next(remaining, None)) is not None else [])]
        else:
            rest.append(argument)
            command = command or (argument if not argument.startswith("-") else "")
    return [*first, *rest]
