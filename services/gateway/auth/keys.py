"""API keys: what they look like and what of them is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import unicodedata
from dataclasses import dataclass

from services.gateway.auth.caller import Caller, KeyLimits, Role
from shared.errors import InvalidRequest

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"
_KEY = re.compile(rf"ovi_([{_ALPHABET}]{{8}})_[A-Za-z0-9_-]{{43}}")
KEY_ID = re.compile(rf"key_[{_ALPHABET}]{{8}}")
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
