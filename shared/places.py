"""Where services are: addresses, and names that stand for as many addresses as a lookup gives."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shared.errors import Unavailable

NAME_PREFIX = "dns:///"
"""Before a name that is looked up, as gRPC writes it."""
LOOKUP_S = 5.0
"""Between two lookups of a name."""
_LOOKUP_TIMEOUT_S = 10.0
_MAX_ADDRESSES = 256
"""Of one name; the others are left out."""
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_NO_ADDRESS = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


@dataclass(frozen=True)
class Place:
    """One service."""

    address: str
    """host:port that is connected to."""
    authority: str = ""
    """Name that its certificate must be for; empty: the host of the address."""


@dataclass(frozen=True)
class Name:
    """Every address of a name has a service on this port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{NAME_PREFIX}{self.host}:{self.port}"


Lookup = Callable[[Name], Awaitable[tuple[Place, ...]]]
"""The places of a name now; none if there is no such name.

Raises Unavailable where nobody could say.
"""


def split_address(text: str) -> tuple[str, int]:
    """Host and port of host:port.

    Raises:
        ValueError: it is none; says what is allowed.
    """
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"got {text[:300]!r}, allowed is host:port")
    return host, int(port)


def parse_place(text: str) -> Place | Name:
    """What a flag names: host:port, or dns:///name:port.

    Raises:
        ValueError: it is neither.
    """
    if text.startswith(NAME_PREFIX):
        try:
            return Name(*split_address(text.removeprefix(NAME_PREFIX)))
        except ValueError:
            raise ValueError(f"got {text[:300]!r}, allowed is {NAME_PREFIX}name:port") from None
    split_address(text)
    return Place(text)


async def look_up(name: Name) -> tuple[Place, ...]:
    """The places of a name, by this system's resolver.

    Raises:
        Unavailable: nobody could say.
    """
    loop = asyncio.get_running_loop()
    asked = loop.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.wait_for(asked, _LOOKUP_TIMEOUT_S)
    except socket.gaierror as error:
        if error.errno in _NO_ADDRESS:
            return ()
        raise Unavailable(f"{name} cannot be looked up ({error.strerror})") from None
    except TimeoutError:
        raise Unavailable(f"{name} was not looked up within {_LOOKUP_TIMEOUT_S:g} s") from None
    hosts = {str(sockaddr[0]) for _, _, _, _, sockaddr in found}
    addresses = sorted(f"[{host}]:{name.port}" if ":" in host else f"{host}:{name.port}" for host in hosts)
    return tuple(Place(address, name.host) for address in addresses[:_MAX_ADDRESSES])
