"""Flags of the gateway that say who may come in, and how."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from shared.tls import Tls, add_tls_flags, is_loopback, require_protection

_SHORTEST_ADMIN_KEY = 32
_MOST_A_MINUTE = 1_000_000


@dataclass(frozen=True)
class AuthOptions:
    """Who may come in."""

    required: bool
    """Every call needs an API key; otherwise nobody is asked and everybody may do everything."""
    admin_key_file: Path | None
    """A file with a key that administers, besides those in the database; None: there is none."""
    requests_per_minute: int
    """Calls a minute of a key that has no limit of its own; 0: any number."""
    address_requests_per_minute: int
    """Calls a minute from one address, with whatever keys; 0: any number."""
    max_watches: int
    """Watches, event streams and sockets that a key may have open at once, on one gateway; 0: any number."""
    open_metrics: bool
    """/metrics asks for no key."""
    audit_log: Path | None
    """File to which the audit is appended, besides the log; None: the log alone."""
    log_prompts: bool
    """Prompts of new jobs are written to the log."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "address_requests_per_minute", "max_watches"):
            value = getattr(self, name)
            if not 0 <= value <= _MOST_A_MINUTE:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: got {value}, allowed is 1 to {_MOST_A_MINUTE}, or 0 for any number")

    def admin_key(self) -> str | None:
        """The content of the admin key's file.

        Raises:
            ValueError: it cannot be read, or what it holds is no good key.
        """
        if self.admin_key_file is None:
            return None
        try:
            key = self.admin_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not text"
            raise ValueError(f"--admin-key-file {self.admin_key_file}: cannot be read ({why})") from None
        if not _SHORTEST_ADMIN_KEY <= len(key) <= 256 or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"--admin-key-file {self.admin_key_file}: holds {len(key)} characters, allowed are"
                f" {_SHORTEST_ADMIN_KEY} to 256 printable ones without spaces; `openssl rand -hex 32` makes a good key"
            )
        return key


@dataclass(frozen=True)
class SecurityOptions:
    """Certificates, and who may come in."""

    tls: Tls
    """Towards clients: of the gRPC and the HTTP port."""
    stage_tls: Tls
    """Towards the stages: of the connections to them, and of the data port."""
    auth: AuthOptions


def add_security_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add_tls_flags(parser)
    add("--stage-tls-ca", type=Path, help="PEM authority of the stages: they are called, and may call, by mTLS alone")
    add("--stage-tls-cert", type=Path, help="PEM certificate shown to the stages (default: --tls-cert)")
    add("--stage-tls-key", type=Path, help="its private key (default: --tls-key)")
    add(
        "--auth",
        choices=["auto", "required"],
        default="auto",
        help="API keys; auto: required unless only the loopback is listened on (default: %(default)s)",
    )
    add("--admin-key-file", type=Path, help="file with a key that administers, besides those of `ovi keys`")
    add("--requests-per-minute", type=int, default=600, help="calls of a key; 0: any number (default: %(default)s)")
    add(
        "--address-requests-per-minute",
        type=int,
        default=6000,
        help="calls from one address, where keys are required; 0: any number (default: %(default)s)",
    )
    add("--max-watches", type=int, default=100, help="open watches of a key; 0: any number (default: %(default)s)")
    add("--open-metrics", action="store_true", help="/metrics asks for no key")
    add("--audit-log", type=Path, help="file to which administrators' calls and refusals are appended")
    add("--log-prompts", action="store_true", help="write the prompts of new jobs to the log")


def security_options(args: argparse.Namespace) -> SecurityOptions:
    """Resolve parsed flags.

    Args:
        args: with --host and --data-host besides the flags of `add_security_flags`.

    Raises:
        ValueError: certificates or keys that cannot be used, or none where they are needed.
    """
    tls = Tls(args.tls_cert, args.tls_key, args.tls_client_ca)
    require_protection("--host", args.host, tls, insecure=args.insecure)
    stage_tls = _stage_tls(args)
    require_protection("--data-host", args.data_host, stage_tls, insecure=args.insecure)
    auth = AuthOptions(
        required=args.auth == "required" or not is_loopback(args.host),
        admin_key_file=args.admin_key_file,
        requests_per_minute=args.requests_per_minute,
        address_requests_per_minute=args.address_requests_per_minute,
        max_watches=args.max_watches,
        open_metrics=args.open_metrics,
        audit_log=args.audit_log,
        log_prompts=args.log_prompts,
    )
    auth.admin_key()
    return SecurityOptions(tls, stage_tls, auth)


def _stage_tls(args: argparse.Namespace) -> Tls:
    own = args.stage_tls_cert is not None or args.stage_tls_key is not None
    if args.stage_tls_ca is None:
        if own:
            raise ValueError("--stage-tls-cert and --stage-tls-key need --stage-tls-ca, the authority of the stages")
        return Tls(prefix="--stage-tls")
    cert, key = (args.stage_tls_cert, args.stage_tls_key) if own else (args.tls_cert, args.tls_key)
    if cert is None:
        raise ValueError("--stage-tls-ca needs --stage-tls-cert and --stage-tls-key, or --tls-cert and --tls-key")
    return Tls(cert, key, args.stage_tls_ca, args.stage_tls_ca, prefix="--stage-tls")
