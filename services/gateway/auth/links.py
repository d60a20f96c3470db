"""Links that open one clip for a while without a key: for players and browsers, which send no headers of ours."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlencode

LIFETIME_S = 24 * 3600


class Links:
    """Signs paths of the HTTP port."""

    def __init__(self, secret: bytes) -> None:
        """
        Args:
            secret: the same on every replica.
        """
        self._secret = secret

    def sign(self, path: str) -> str:
        """The path with the signature that opens it for a day."""
        expires = int(time.time()) + LIFETIME_S
        return f"{path}?{urlencode({'expires': expires, 'signature': self._signature(path, expires)})}"

    def opens(self, path: str, query: Mapping[str, str]) -> bool:
        """True if the query has a signature of this very path whose time is not over."""
        expires, signature = query.get("expires", ""), query.get("signature", "")
        if not expires.isascii() or not expires.isdecimal() or len(expires) > 12 or int(expires) < time.time():
            return False
        right = self._signature(path, int(expires))
        return hmac.compare_digest(right.encode(), signature.encode(errors="surrogatepass"))

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()
