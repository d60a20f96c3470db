"""A worker's side of its registration: it tells gateways where it is, for as long as it serves."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from ovi.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from shared.errors import OviError, Unavailable
from shared.grpc_client import error_of
from shared.logging import get_logger
from shared.places import Lookup, Name, Place, look_up, parse_place
from shared.tls import INSECURE_FLAG, Tls, is_loopback, open_channel

log = get_logger(__name__)

_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
_RENEWALS = 3
"""In the time of a lease."""
_RETRY_S = 2.0
_CALL_TIMEOUT_S = 5.0
_GOODBYE_TIMEOUT_S = 1.0
_LONGEST_PAUSE_S = 60.0
_SHORTEST_PAUSE_S = 0.2


@dataclass(frozen=True)
class Registration:
    """With whom a worker registers, and how.

    Raises:
        ValueError: the key cannot be read, or would travel readable.
    """

    gateways: tuple[Place | Name, ...]
    """Every one of them is told."""
    tls: Tls
    """Of the connections to them."""
    key_file: Path | None = None
    """Holds an API key with the role worker; None: none is shown."""
    insecure: bool = False
    """The key may travel readable."""

    def __post_init__(self) -> None:
        key = self.key()
        for gateway in self.gateways:
            host = gateway.host if isinstance(gateway, Name) else gateway.address.rpartition(":")[0]
            if key and not self.tls.connects and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"--gateway {host}: without TLS everybody on the way could read the API key;"
                    f" add --gateway-tls-ca FILE, or {INSECURE_FLAG} for a network that you trust"
                )

    def key(self) -> str:
        """The API key; empty if there is none.

        Raises:
            ValueError: the file cannot be read, or holds none.
        """
        if self.key_file is None:
            return ""
        try:
            key = self.key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not text"
            raise ValueError(f"--gateway-key-file {self.key_file}: cannot be read ({why})") from None
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"--gateway-key-file {self.key_file}: holds no API key")
        return key


def add_registration_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("--gateway", default="", help="gateways to register with: host:port or dns:///name:port, comma-separated")
    add("--gateway-key-file", type=Path, help="file with the API key for that (`ovi keys create NAME --role worker`)")
    add("--gateway-tls-ca", type=Path, help="PEM authority of the gateways, which then are called by TLS")


def registration_of(args: argparse.Namespace) -> Registration | None:
    """Resolve parsed flags; None if the worker registers nowhere.

    Args:
        args: with --tls-cert, --tls-key and --insecure besides the flags of `add_registration_flags`.

    Raises:
        ValueError: names the flag that cannot be used.
    """
    try:
        gateways = tuple(parse_place(part.strip()) for part in args.gateway.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"--gateway: {error}") from None
    if not gateways:
        if args.gateway_key_file is not None or args.gateway_tls_ca is not None:
            raise ValueError("--gateway-key-file and --gateway-tls-ca need --gateway")
        return None
    tls = Tls(args.tls_cert, args.tls_key, None, args.gateway_tls_ca, prefix="--gateway-tls")
    return Registration(gateways, tls, args.gateway_key_file, args.insecure)


class Announcer:
    """Registers one worker with its gateways."""

    def __init__(self, stage: str, host: str, registration: Registration, lookup: Lookup = look_up) -> None:
        """
        Args:
            stage: name of the service.
            host: under which gateways reach it.
            registration: with whom, and how.
            lookup: of names; tests put their own in.
        """
        self._stage = stage
        self._host = host
        self._registration = registration
        key = registration.key()
        self._metadata: Sequence[tuple[str, str]] = [("authorization", f"Bearer {key}")] if key else []
        self._lookup = lookup
        self._channels: dict[Place, grpc.aio.Channel] = {}
        self._registered: set[Place] = set()
        self._refusals: dict[Place, str] = {}
        """What was said last of why it is not."""
        self._found: dict[Name, tuple[Place, ...]] = {}
        """Of each name at its last lookup that told anything."""

    async def run(self, port: int) -> None:
        """Register again and again until cancelled, then take the registrations back.

        Args:
            port: of the worker's gRPC service.
        """
        address = f"{self._host}:{port}"
        try:
            while True:
                places = await self._places()
                for gone in self._channels.keys() - set(places):
                    self._registered.discard(gone)
                    self._refusals.pop(gone, None)
                    await self._channels.pop(gone).close()
                leases = await asyncio.gather(*(self._register(place, address) for place in places))
                pauses = [lease_s / _RENEWALS if lease_s is not None else _RETRY_S for lease_s in leases]
                await asyncio.sleep(min(max(_SHORTEST_PAUSE_S, min(pauses, default=_RETRY_S)), _LONGEST_PAUSE_S))
        finally:
            await asyncio.gather(*(self._unregister(place, address) for place in self._registered))
            await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _places(self) -> tuple[Place, ...]:
        places: dict[Place, None] = {}
        for gateway in self._registration.gateways:
            if isinstance(gateway, Place):
                places[gateway] = None
                continue
            try:
                self._found[gateway] = await self._lookup(gateway)
            except Unavailable as error:
                log.warning("gateways cannot be looked up", reason=error.message)
            places |= dict.fromkeys(self._found.get(gateway, ()))
        return tuple(places)

    async def _register(self, place: Place, address: str) -> float | None:
        """Seconds of the lease; None if the gateway did not give one."""
        request = gateway_pb2.RegisterWorkerRequest(stage=self._stage, address=address)
        try:
            call = self._stub(place).RegisterWorker(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
            lease_s: float = (await call).lease_seconds
        except grpc.aio.AioRpcError as error:
            told: OviError = error_of(error)
            if self._refusals.get(place) != told.message:
                log.warning("not registered", gateway=place.address, reason=told.message)
            self._refusals[place] = told.message
            self._registered.discard(place)
            return None
        self._refusals.pop(place, None)
        if place not in self._registered:
            log.info("registered", gateway=place.address, address=address, lease_s=lease_s)
        self._registered.add(place)
        return lease_s

    async def _unregister(self, place: Place, address: str) -> None:
        request = gateway_pb2.UnregisterWorkerRequest(stage=self._stage, address=address)
        try:
            await self._stub(place).UnregisterWorker(request, timeout=_GOODBYE_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            log.info("a registration is left to end by itself", gateway=place.address, reason=error_of(error).message)

    def _stub(self, place: Place) -> gateway_pb2_grpc.WorkerServiceStub:
        channel = self._channels.get(place)
        if channel is None:
            options, tls = _CHANNEL_OPTIONS, self._registration.tls
            channel = self._channels[place] = open_channel(place.address, tls, options, authority=place.authority)
        return gateway_pb2_grpc.WorkerServiceStub(channel)
