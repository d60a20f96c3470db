"""Workers that registered themselves: each holds a lease, and is gone when it does not renew it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from services.gateway.workers.replicas import Origin, Replicas, WorkerSource
from shared.errors import FailedPrecondition, InvalidRequest, PermissionDenied, ResourceExhausted
from shared.logging import get_logger
from shared.places import Place, split_address
from shared.tls import is_loopback

log = get_logger(__name__)

LEASE_S = 15.0
MAX_REGISTERED = 256
"""Of all stages."""
_ORIGIN = Origin(WorkerSource.REGISTERED)


@dataclass(frozen=True)
class _Lease:
    key_id: str
    until_s: float


class Registry:
    """The registrations at this gateway."""

    def __init__(
        self,
        pools: Mapping[str, Replicas[Any]],
        open_to: Collection[str],
        accepts_host: Callable[[str], bool],
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            pools: the workers of every stage, by its name.
            open_to: stages whose workers may register.
            accepts_host: whether the operator has named this host.
            lease_s: of a registration.
            clock: seconds; tests put their own in.
        """
        self._pools = pools
        self._open_to = frozenset(open_to)
        self._accepts_host = accepts_host
        self._lease_s = lease_s
        self._clock = clock
        self._leases: dict[tuple[str, str], _Lease] = {}

    def register(self, stage: str, address: str, *, caller_address: str, key_id: str = "") -> float:
        """Take a worker up, or renew its lease; seconds until that ends.

        Args:
            stage: its service.
            address: host:port at which it is called.
            caller_address: whence the registration comes, without a port.
            key_id: of the API key that was shown; empty where none is asked for.

        Raises:
            InvalidRequest: no such stage, or an address that may not be called.
            FailedPrecondition: workers of this stage do not register here.
            PermissionDenied: it was registered with another key.
            ResourceExhausted: there are as many as there may be.
        """
        self._check(stage, address, caller_address)
        self.expire()
        known = self._leases.get((stage, address))
        self._check_key(known, key_id)
        if known is None and len(self._leases) >= MAX_REGISTERED:
            raise ResourceExhausted(f"{MAX_REGISTERED} workers are registered here, which is the most")
        self._leases[stage, address] = _Lease(key_id, self._clock() + self._lease_s)
        if known is None:
            self._place(stage)
        return self._lease_s

    def unregister(self, stage: str, address: str, *, key_id: str = "") -> None:
        """Let a worker go; one that is not registered is no error.

        Raises:
            PermissionDenied: it was registered with another key.
        """
        known = self._leases.get((stage, address))
        self._check_key(known, key_id)
        if known is not None:
            del self._leases[stage, address]
            self._place(stage)

    def expire(self) -> None:
        """Let those go whose lease has ended."""
        now_s = self._clock()
        ended = [worker for worker, lease in self._leases.items() if lease.until_s <= now_s]
        for stage, address in ended:
            log.warning("a registration was not renewed", stage=stage, address=address)
            del self._leases[stage, address]
        for stage in {stage for stage, _ in ended}:
            self._place(stage)

    def _place(self, stage: str) -> None:
        self._pools[stage].place(_ORIGIN, [Place(address) for known, address in self._leases if known == stage])

    def _check(self, stage: str, address: str, caller_address: str) -> None:
        if stage not in self._pools:
            raise InvalidRequest.of("stage", f"got {stage[:40]!r}, allowed is one of {sorted(self._pools)}")
        if stage not in self._open_to:
            flag = stage.replace("_", "-")
            raise FailedPrecondition(
                f"this gateway takes no registrations of {stage}; start it with --{flag} registered"
            )
        try:
            host, _ = split_address(address)
        except ValueError as error:
            raise InvalidRequest.of("address", str(error)) from None
        if not self._accepts_host(host):
            what = f"got the host {host!r}, allowed are those of --producer-hosts, whose tensors are fetched, too"
            raise InvalidRequest.of("address", what)
        if is_loopback(host) and not is_loopback(caller_address):
            what = f"got {address!r} from another machine, for which this gateway's own loopback is not its address"
            raise InvalidRequest.of("address", f"{what}; give the worker --advertise-host")

    def _check_key(self, known: _Lease | None, key_id: str) -> None:
        if known is not None and known.key_id != key_id and known.until_s > self._clock():
            raise PermissionDenied("this address was registered with another API key")
