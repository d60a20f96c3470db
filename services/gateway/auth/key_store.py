"""Where API keys are kept, and what else gateways on one database keep secret together."""

from __future__ import annotations

import secrets
import time

import sqlalchemy as sa

from services.gateway.auth.caller import KeyLimits, Role
from services.gateway.auth.keys import KEY_ID, ApiKey
from services.gateway.auth.schema import api_keys, secrets_table
from shared.errors import InvalidRequest, NotFound


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
        if KEY_ID.fullmatch(key_id) is None:
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
