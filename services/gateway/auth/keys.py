"""API keys: what they look like, and where they are kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import unicodedata
from dataclasses import dataclass

import sqlalchemy as sa

from services.gateway.auth.caller import Caller, KeyLimits, Role
from services.gateway.auth.schema import api_keys, secrets_table
from shared.errors import InvalidRequest, NotFound

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"
_KEY = re.compile(rf"ovi_([{_ALPHABET}]{{8}})_[A-Za-z0-9_-]{{43}}")
_ID = re.compile(rf"key_[{_ALPHABET}]{{8}}")
MAX_NAME_CHARACTERS = 80
LONGEST_KEY = 256
"""Nothing longer is looked at."""


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept: everything but the key itself. Times are Unix seconds."""

    id: str
    name: str
    role: Role
    hash: str
    """SHA-256 of the key in hex digits. It has 256 random bits, so nobody finds it by trying, salted or not."""
    limits: KeyLimits
    create_time_s: float
    revoke_time_s: float | None = None

    @property
    def prefix(self) -> str:
        """What of the key may be shown, to tell keys apart."""
        return "ovi_" + self.id.removeprefix("key_")

    @property
    def caller(self) -> Caller:
        """Whoever shows it."""
        return Caller(self.role, self.id, self.name, self.limits)

    def is_of(self, secret: str) -> bool:
        """True if this is the key; takes the same time however much of it is right."""
        return hmac.compare_digest(self.hash, hash_of(secret))


def hash_of(secret: str) -> str:
    """SHA-256 in hex digits."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def id_of(secret: str) -> str | None:
    """The id of the key that this text may be; None if it is none."""
    match = _KEY.fullmatch(secret)
    return None if match is None else f"key_{match[1]}"


def new_key(name: str, role: Role, limits: KeyLimits) -> tuple[ApiKey, str]:
    """A fresh key and its secret, which is told once and kept nowhere.

    Raises:
        InvalidRequest: a name that is empty, too long or not printable.
    """
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS or any(unicodedata.category(c)[0] == "C" for c in name):
        what = f"got {name[:100]!r}, allowed is 1 to {MAX_NAME_CHARACTERS} printable characters"
        raise InvalidRequest.of("name", what)
    label = "".join(secrets.choice(_ALPHABET) for _ in range(8))
    secret = f"ovi_{label}_{secrets.token_urlsafe(32)}"
    return ApiKey(f"key_{label}", name, role, hash_of(secret), limits, time.time()), secret


class KeyStore:
    """Keys in the gateway's database. Thread-safe; each call is a transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        """
        Args:
            engine: of a database that was migrated.
        """
        self._engine = engine

    def add(self, key: ApiKey) -> None:
        """Keep a new key."""
        row = {
            "id": key.id,
            "name": key.name,
            "role": key.role.value,
            "hash": key.hash,
            "max_concurrent_jobs": key.limits.max_concurrent_jobs,
            "max_daily_jobs": key.limits.max_daily_jobs,
            "requests_per_minute": key.limits.requests_per_minute,
            "create_time_s": key.create_time_s,
        }
        with self._engine.begin() as connection:
            connection.execute(sa.insert(api_keys).values(row))

    def find(self, key_id: str) -> ApiKey | None:
        """The key of this id, revoked or not."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).mappings().one_or_none()
        return None if row is None else _key_of(row)

    def all(self) -> list[ApiKey]:
        """Every key, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.create_time_s, api_keys.c.id)).mappings()
            return [_key_of(row) for row in rows]

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for good; one that was revoked before stays as it is. Its jobs stay.

        Raises:
            InvalidRequest: this is no id.
            NotFound: there is none.
        """
        if _ID.fullmatch(key_id) is None:
            raise InvalidRequest.of(
                "id", f"got {key_id[:64]!r}, allowed is key_ and 8 characters, as a list shows them"
            )
        with self._engine.begin() as connection:
            unrevoked = sa.and_(api_keys.c.id == key_id, api_keys.c.revoke_time_s.is_(None))
            connection.execute(sa.update(api_keys).where(unrevoked).values(revoke_time_s=time.time()))
        key = self.find(key_id)
        if key is None:
            raise NotFound(f"there is no API key {key_id!r}; `ovi keys list` shows what there is")
        return key

    def shared_secret(self, name: str) -> bytes:
        """32 random bytes that are the same for every gateway on this database; made when first asked for."""
        for _ in range(2):
            with self._engine.connect() as connection:
                query = sa.select(secrets_table.c.value).where(secrets_table.c.name == name)
                value = connection.execute(query).scalar_one_or_none()
            if value is not None:
                break
            value = secrets.token_hex(32)
            try:
                with self._engine.begin() as connection:
                    connection.execute(sa.insert(secrets_table).values(name=name, value=value))
                break
            except sa.exc.IntegrityError:
                # Another gateway was faster; its value counts.
                continue
        assert value is not None
        return bytes.fromhex(value)


def _key_of(row: sa.RowMapping) -> ApiKey:
    limits = KeyLimits(row["max_concurrent_jobs"], row["max_daily_jobs"], row["requests_per_minute"])
    return ApiKey(
        id=row["id"],
        name=row["name"],
        role=Role(row["role"]),
        hash=row["hash"],
        limits=limits,
        create_time_s=row["create_time_s"],
        revoke_time_s=row["revoke_time_s"],
    )
