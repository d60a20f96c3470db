"""The one place where callers become known: credentials to a `Caller`, within limits."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import sqlalchemy as sa

from services.gateway.auth.audit import Audit
from services.gateway.auth.buckets import Buckets
from services.gateway.auth.caller import LOCAL, Action, Caller, Role
from services.gateway.auth.key_store import KeyStore
from services.gateway.auth.keys import LONGEST_KEY, ApiKey, hash_of, id_of
from services.gateway.auth.limits import KeyLimitsBook
from services.gateway.auth.links import Links
from services.gateway.auth.options import AuthOptions
from services.gateway.disk import database_away_is_said
from shared.errors import OviError, RateLimited, Unauthenticated
from shared.logging import get_logger

log = get_logger(__name__)

_FAILURES_PER_MINUTE = 60
"""Of one address; good keys from there stay good."""
_KNOWN_FOR_S = 2.0
"""How long a key that was looked up is taken to be as it was: within this time a revoked one ends."""
_MAX_KNOWN = 10_000
_LIMITS_EVERY_S = 5.0
_ADMIN_FILE_ID = "key_of_file"
_HOW = (
    "send `Authorization: Bearer KEY` (gRPC: the metadata key authorization; `ovi`: OVI_API_KEY or --api-key);"
    " an administrator makes keys with `ovi keys create NAME`"
)


class Gate:
    """Lets calls in. Used from the event loop."""

    def __init__(
        self,
        store: KeyStore,
        options: AuthOptions,
        audit: Audit,
        limits: KeyLimitsBook,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            store: of the keys; asked only where keys are required.
            options: who may come in.
            audit: told of administrators' calls and refusals.
            limits: kept up to date from the store.
            clock: seconds; tests put their own in.
        """
        self.options = options
        self.audit = audit
        self._limits = limits
        self._reading: asyncio.Task[None] | None = None
        self._store = store
        self._clock = clock
        admin_key = options.admin_key()
        self._admin_hash = None if admin_key is None else hash_of(admin_key)
        self._known: OrderedDict[str, tuple[ApiKey | None, float]] = OrderedDict()
        self._key_calls = Buckets("calls with this API key", clock)
        self._address_calls = Buckets("calls from this address", clock)
        self._failures = Buckets("wrong API keys from this address", clock)
        self._watches: Counter[str] = Counter()
        self._links: Links | None = None

    async def admit(self, credentials: str, address: str) -> Caller:
        """Who shows these credentials; counts the call.

        Args:
            credentials: the key; empty: none was shown.
            address: of the other end, without a port.

        Raises:
            Unauthenticated: no key, or one that is not or no longer good; says what to do.
            RateLimited: too many calls.
        """
        if not self.options.required:
            return LOCAL
        where = _network(address)
        self._address_calls.take(where, self.options.address_requests_per_minute)
        if not credentials:
            raise Unauthenticated(f"this gateway asks for an API key: {_HOW}")
        caller = await self._caller_of(credentials)
        if caller is None:
            self._failures.take(where, _FAILURES_PER_MINUTE)
            self.audit.note(Caller(Role.VIEWER), "authenticate", address, "refused: unknown or revoked API key")
            raise Unauthenticated(f"this API key is unknown here or was revoked: {_HOW}")
        self._charge(caller)
        return replace(caller, sign=self.link)

    def admit_link(self, path: str, query: Mapping[str, str], address: str, job_id: str) -> Caller | None:
        """Whoever has a signed link, who sees that one job; None if it is none, or not good.

        Raises:
            RateLimited: too many calls.
        """
        if not self.options.required or self._links is None or "signature" not in query:
            return None
        self._address_calls.take(_network(address), self.options.address_requests_per_minute)
        return Caller(Role.VIEWER, only_job=job_id) if self._links.opens(path, query) else None

    async def start(self) -> None:
        """Read what is shared with the other gateways, and go on reading; once the tables are there."""
        if self.options.required:
            self._links = Links(await asyncio.to_thread(self._store.shared_secret, "links"))
            self._limits.write(await asyncio.to_thread(self._store.all))
            self._reading = asyncio.create_task(self._read_limits())

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        self.audit.close()

    async def _read_limits(self) -> None:
        while True:
            await asyncio.sleep(_LIMITS_EVERY_S)
            try:
                self._limits.write(await asyncio.to_thread(self._store.all))
            except sa.exc.SQLAlchemyError as error:
                log.warning("limits of API keys cannot be read now", reason=str(error))

    def link(self, path: str) -> str:
        """A path of the HTTP port as it is told to clients: signed where keys are required."""
        return path if self._links is None else self._links.sign(path)

    async def readmit(self, caller: Caller) -> None:
        """Look again at a caller that was let in before, and count a call (a socket's event).

        Raises:
            Unauthenticated: its key was revoked since.
            RateLimited: too many calls.
        """
        if caller.key_id and caller.key_id != _ADMIN_FILE_ID:
            key = await self._find(caller.key_id)
            if key is None or key.revoke_time_s is not None:
                raise Unauthenticated(f"this API key was revoked: {_HOW}")
        self._charge(caller)

    def _charge(self, caller: Caller) -> None:
        if caller.key_id:
            own = caller.limits.requests_per_minute
            self._key_calls.take(caller.key_id, self.options.requests_per_minute if own is None else own)

    def check(self, caller: Caller, action: Action, what: str, address: str) -> None:
        """Go on only if the caller's role allows it; the audit is told.

        Raises:
            PermissionDenied: it does not.
        """
        try:
            caller.require(action)
        except OviError:
            self.audit.call(caller, action, what, address, f"refused: role {caller.role.value}")
            raise
        self.audit.call(caller, action, what, address, "allowed")

    @contextlib.contextmanager
    def watching(self, caller: Caller) -> Iterator[None]:
        """Around a watch, an event stream or a socket.

        Raises:
            RateLimited: this key has as many open as it may.
        """
        most = self.options.max_watches
        if not caller.key_id or not most:
            yield
            return
        if self._watches[caller.key_id] >= most:
            raise RateLimited(f"this API key has {most} watches open on this gateway; close one first", 5.0)
        self._watches[caller.key_id] += 1
        try:
            yield
        finally:
            self._watches[caller.key_id] -= 1
            if not self._watches[caller.key_id]:
                del self._watches[caller.key_id]

    async def _caller_of(self, credentials: str) -> Caller | None:
        if len(credentials) > LONGEST_KEY:
            return None
        if self._admin_hash is not None and hmac.compare_digest(self._admin_hash, hash_of(credentials)):
            return Caller(Role.ADMIN, _ADMIN_FILE_ID, "--admin-key-file")
        key_id = id_of(credentials)
        if key_id is None:
            return None
        key = await self._find(key_id)
        good = key is not None and key.is_of(credentials) and key.revoke_time_s is None
        return key.caller if key is not None and good else None

    async def _find(self, key_id: str) -> ApiKey | None:
        known = self._known.get(key_id)
        if known is not None and self._clock() - known[1] < _KNOWN_FOR_S:
            return known[0]
        with database_away_is_said():
            key = await asyncio.to_thread(self._store.find, key_id)
        if key is not None:
            # One that was just made counts from its first call.
            self._limits.add(key)
        self._known[key_id] = (key, self._clock())
        self._known.move_to_end(key_id)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return key


def credentials_of(headers: Mapping[str, str]) -> str:
    """The key in headers or metadata (lower-case names): `authorization: Bearer KEY`, or `x-api-key`; or nothing."""
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip()


def _network(address: str) -> str:
    """What is counted as one address: of IPv6 the 64 bits that one customer has at least."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is None:
        return str(ipaddress.ip_network((known, 64), strict=False))
    return str(known)
