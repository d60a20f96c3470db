"""The gateway in a world of its own names: `python -m tests.grpc.named_gateway FLAGS`, as `services.gateway`.

Names below `.test` have the addresses that are in the file of that name in the folder OVI_TEST_NAMES, and are looked up
five times a second.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import Any

from services.gateway import __main__ as gateway
from services.gateway.workers.directory import Directory

_getaddrinfo = socket.getaddrinfo


def _look_up(host: str, port: int, *arguments: Any, **options: Any) -> Any:
    if not host.endswith(".test"):
        return _getaddrinfo(host, port, *arguments, **options)
    addresses = (Path(os.environ["OVI_TEST_NAMES"]) / host).read_text().split()
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "there is no such name")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


if __name__ == "__main__":
    socket.getaddrinfo = _look_up
    gateway.Directory = functools.partial(Directory, lookup_s=0.2)  # type: ignore[misc,assignment]
    gateway.main()
