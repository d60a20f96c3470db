"""Flags of the HTTP side."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

DEFAULT_MAX_BODY_MIB = 48.0
"""Room for the largest picture (32 MiB) as a data URL."""


@dataclass(frozen=True)
class HttpOptions:
    """How the HTTP side answers."""

    cors_origins: tuple[str, ...]
    """Origins whose scripts may call, such as https://studio.example.com; none: only pages of the gateway itself."""
    max_body_bytes: int
    """Largest body of a request, and largest WebSocket message."""

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1024:
            raise ValueError(f"--max-body-mib: got {self.max_body_bytes} bytes, allowed is 1 KiB or more")
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


def http_options(args: argparse.Namespace) -> HttpOptions:
    """Resolve parsed flags.

    Raises:
        ValueError: one that is not allowed, with the flag's name.
    """
    origins = tuple(part.strip().rstrip("/") for part in args.cors_origins.split(",") if part.strip())
    return HttpOptions(cors_origins=origins, max_body_bytes=int(args.max_body_mib * 2**20))
