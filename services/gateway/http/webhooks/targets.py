"""Where webhooks may go: hosts of a list, at public addresses, which are looked up once and then kept to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from shared.errors import InvalidRequest

_MAX_URL_CHARACTERS = 2048
_LARGEST_PORT = 65_535
_PORTS = {"https": 443, "http": 80}


class Refused(Exception):
    """A host that must not, or cannot, be called; the message says why."""


@dataclass(frozen=True)
class Target:
    """A checked URL and the one address that it is called at."""

    url: httpx.URL
    address: str

    @property
    def pinned_url(self) -> httpx.URL:
        """The URL with the address in place of the name: nothing is looked up again."""
        return self.url.copy_with(host=self.address)

    @property
    def host_header(self) -> str:
        """What the receiver is called, for its Host header."""
        return self.url.netloc.decode("ascii")


class TargetRules:
    """Which URLs may be called."""

    def __init__(self, hosts: Sequence[str], *, allow_private: bool) -> None:
        """
        Args:
            hosts: names, or `*.name` for every name below; none: no URL may be called.
            allow_private: also loopback and private addresses, and plain HTTP.
        """
        self._hosts = tuple(host.lower() for host in hosts)
        self._allow_private = allow_private

    def check(self, text: str, *, field: str) -> httpx.URL:
        """The URL if its form and its host are allowed; its address is looked up when it is called.

        Raises:
            InvalidRequest: they are not; names `field`.
        """
        shown = text[:80]
        try:
            url = httpx.URL(text[: _MAX_URL_CHARACTERS + 1])
        except (httpx.InvalidURL, ValueError):
            raise InvalidRequest.of(field, f"got {shown!r}, which is no URL") from None
        schemes = ("https", "http") if self._allow_private else ("https",)
        legal = len(text) <= _MAX_URL_CHARACTERS and (url.port is None or 0 < url.port <= _LARGEST_PORT)
        if not legal or url.scheme not in schemes or not url.host or url.userinfo:
            what = f"a URL of {' or '.join(schemes)} without a password, up to {_MAX_URL_CHARACTERS} characters"
            raise InvalidRequest.of(field, f"got {shown!r}, allowed is {what}")
        if not any(_matches(url.host.lower(), host) for host in self._hosts):
            allowed = ", ".join(self._hosts) or "none: the gateway was started without --webhook-hosts"
            raise InvalidRequest.of(field, f"got the host {url.host[:80]!r}, allowed is {allowed}")
        return url

    async def resolve(self, url: httpx.URL) -> Target:
        """Look up the host, once.

        Raises:
            Refused: it has no address, or one that must not be called.
        """
        port = url.port or _PORTS[url.scheme]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Refused(f"{url.host} was not found ({error})") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not self._allow_private and not is_public(address):
                raise Refused(f"{url.host} has the address {address}, which is not a public one")
        return Target(url, addresses[0])


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet: not loopback, private, link-local, multicast or reserved."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _matches(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:]) and len(host) > len(allowed) - 1
    return host == allowed
