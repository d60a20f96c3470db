"""Ports of the services: checked before anything starts, so that a taken one is named together with its flag."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

from cli.errors import UsageProblem


def connect_host(host: str) -> str:
    """The name under which a server listening on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}.get(host, host)


@dataclass
class ReservedPort:
    """A port kept for one gRPC server, over its restarts, until `close`.

    gRPC binds with SO_REUSEPORT. A second socket bound the same way and never listening keeps the number from
    everybody else, and receives nothing.
    """

    number: int
    _socket: socket.socket

    def close(self) -> None:
        """Give the number back."""
        self._socket.close()


def reserve_grpc_port(host: str, port: int, *, flag: str) -> ReservedPort:
    """Keep `port` of `host` (0: any free one) for a gRPC server.

    Raises:
        UsageProblem: the port is taken or not allowed; names it and the flag.
    """
    if port:
        _bind(host, port, flag=flag, share=False).close()
    reserved = _bind(host, port, flag=flag, share=True)
    return ReservedPort(int(reserved.getsockname()[1]), reserved)


def free_http_port(host: str, port: int, *, flag: str) -> int:
    """`port` of `host` if it is free, or any free one for 0. Not kept: HTTP servers bind alone.

    Raises:
        UsageProblem: the port is taken or not allowed; names it and the flag.
    """
    with _bind(host, port, flag=flag, share=False) as bound:
        return int(bound.getsockname()[1])


def _bind(host: str, port: int, *, flag: str, share: bool) -> socket.socket:
    if not 0 <= port < 65536:
        raise UsageProblem(f"{flag}: got {port}, allowed is 0 (any free port) to 65535")
    bare = host.strip("[]")
    bound = socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share and hasattr(socket, "SO_REUSEPORT"):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((bare, port))
    except OSError as error:
        bound.close()
        raise UsageProblem(_refusal(host, port, flag, error)) from None
    return bound


def _refusal(host: str, port: int, flag: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{flag}: port {port} is taken by another program; end it, choose another port, or 0 for any free one"
    if error.errno == errno.EACCES:
        return f"{flag}: port {port} needs privileges this user does not have; choose one above 1023"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"--host: cannot listen on {host!r} ({reason}); 127.0.0.1 serves this machine, 0.0.0.0 every network"
