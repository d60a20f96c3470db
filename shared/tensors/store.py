"""The producer's side: tensors held for consumers under leases."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shared.errors import ReferenceLost, ResourceExhausted
from shared.tensors.framing import TensorSpec, spec_of


def _nothing() -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Lease:
    """A held tensor: its id, its values (contiguous, on the CPU), its spec and when it is forgotten (Unix seconds)."""

    tensor_id: str
    tensor: torch.Tensor
    spec: TensorSpec
    expire_time_s: float
    on_end: Callable[[], None] = field(default=_nothing, compare=False)
    """Called once, when the lease has ended; on any thread, with the store locked."""


class TensorStore:
    """Leases by id. Thread-safe. A lease ends by release or by time, so a dead consumer leaks nothing."""

    def __init__(self, *, lease_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            lease_s: how long a tensor is kept unless released before.
            max_bytes: most bytes held at once, each lease counted in full.
            clock: Unix seconds; tests put their own in.
        """
        self._lease_s = lease_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Condition()

    def put(
        self, tensor: torch.Tensor, *, spec: TensorSpec | None = None, on_end: Callable[[], None] = _nothing
    ) -> Lease:
        """Hold a tensor; copies it to the CPU if it is elsewhere. `spec` saves the checksum if it is known already.

        Args:
            tensor: any.
            spec: of it.
            on_end: see Lease; a lease that runs out is noticed when the store is used.

        Raises:
            ResourceExhausted: the store is full.
        """
        tensor = tensor.detach().to("cpu").contiguous()
        spec = spec or spec_of(tensor)
        with self._lock:
            self._drop_expired()
            held = sum(lease.spec.num_bytes for lease in self._leases.values())
            if held + spec.num_bytes > self._max_bytes:
                raise ResourceExhausted(
                    f"tensor store holds {held} bytes of {self._max_bytes}; {spec.num_bytes} more do not fit."
                    " Release finished tensors or wait for leases to end"
                )
            lease = Lease(secrets.token_urlsafe(16), tensor, spec, self._clock() + self._lease_s, on_end)
            self._leases[lease.tensor_id] = lease
        return lease

    def get(self, tensor_id: str) -> Lease:
        """The lease of this id.

        Raises:
            ReferenceLost: never held here, released, or expired.
        """
        with self._lock:
            self._drop_expired()
            lease = self._leases.get(tensor_id)
        if lease is None:
            raise ReferenceLost(
                f"tensor {tensor_id[:64]!r} is not held here: its lease ended or this process restarted"
            )
        return lease

    def release(self, tensor_id: str) -> bool:
        """End a lease; True if it was still held."""
        with self._lock:
            self._drop_expired()
            lease = self._leases.pop(tensor_id, None)
            if lease is not None:
                lease.on_end()
            self._lock.notify_all()
        return lease is not None

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until every lease is released; False if some are still held after `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._leases, timeout_s)

    def __len__(self) -> int:
        with self._lock:
            self._drop_expired()
            return len(self._leases)

    def _drop_expired(self) -> None:
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if lease.expire_time_s <= now]:
            del self._leases[lease.tensor_id]
            lease.on_end()
