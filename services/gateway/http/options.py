"""Flags of the HTTP side."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MAX_BODY_MIB = 48.0
"""Room for the largest picture (32 MiB) as a data URL."""
DEFAULT_MAX_CONNECTIONS = 4096
_MOST_CONNECTIONS = 1_000_000


@dataclass(frozen=True)
class HttpOptions:
    """How the HTTP side answers."""

    cors_origins: tuple[str, ...]
    """Origins whose scripts may call, such as https://studio.example.com; none: only pages of the gateway itself."""
    max_body_bytes: int
    """Largest body of a request, and largest WebSocket message."""
    max_connections: int
    """Open connections at once; those beyond it are refused."""
    webhook_secret_file: Path | None
    """Holds the key that signs webhooks; None: none are sent."""
    webhook_hosts: tuple[str, ...]
    """Hosts that webhooks may go to; `*.name`: every name below."""
    webhook_private: bool
    """Webhooks may also go to loopback and private addresses, and without TLS."""

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1024:
            raise ValueError(f"--max-body-mib: got {self.max_body_bytes} bytes, allowed is 1 KiB or more")
        if not 1 <= self.max_connections <= _MOST_CONNECTIONS:
            raise ValueError(f"--max-connections: got {self.max_connections}, allowed is 1 to {_MOST_CONNECTIONS}")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(f"--cors-origins: got {origin!r}, allowed is scheme://host[:port], or *")


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the HTTP side."""
    add = parser.add_argument
    add("--cors-origins", default="", help="comma-separated origins whose scripts may call (default: none)")
    add(
        "--max-body-mib",
        type=float,
        default=DEFAULT_MAX_BODY_MIB,
        help="largest body of an HTTP request, in MiB (default: %(default)s)",
    )
    add(
        "--max-connections",
        type=int,
        default=DEFAULT_MAX_CONNECTIONS,
        help="open HTTP connections at once, event streams and sockets among them (default: %(default)s)",
    )
    add(
        "--webhook-secret-file",
        type=Path,
        help="file with the key (whsec_...) that signs webhooks; none: none are sent",
    )
    add("--webhook-hosts", default="", help="comma-separated hosts that webhooks may go to; *.name: all below it")
    add("--webhook-private", action="store_true", help="webhooks may go to private addresses, and by plain HTTP")


def http_options(args: argparse.Namespace) -> HttpOptions:
    """Resolve parsed flags.

    Raises:
        ValueError: one that is not allowed, with the flag's name.
    """
    return HttpOptions(
        cors_origins=tuple(origin.rstrip("/") for origin in _listed(args.cors_origins)),
        max_body_bytes=int(args.max_body_mib * 2**20),
        max_connections=args.max_connections,
        webhook_secret_file=args.webhook_secret_file,
        webhook_hosts=_listed(args.webhook_hosts),
        webhook_private=args.webhook_private,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
