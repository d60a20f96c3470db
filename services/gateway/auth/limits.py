"""Limits of all keys in memory, for whoever lets jobs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.gateway.auth.caller import NO_LIMITS, KeyLimits
from services.gateway.auth.keys import ApiKey


class KeyLimitsBook:
    """Limits by key. Read from any thread, written from one."""

    def __init__(self) -> None:
        self._limits: Mapping[str, KeyLimits] = {}

    def of(self, key_id: str) -> KeyLimits:
        """The limits of a key; none for one that is not known, and for calls without one."""
        return self._limits.get(key_id, NO_LIMITS)

    def write(self, keys: Iterable[ApiKey]) -> None:
        """Take these for all the keys there are."""
        self._limits = {key.id: key.limits for key in keys}

    def add(self, key: ApiKey) -> None:
        """Take these for one key."""
        if self._limits.get(key.id) != key.limits:
            self._limits = {**self._limits, key.id: key.limits}
