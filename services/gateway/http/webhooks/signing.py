"""Signatures of webhooks, as the Standard Webhooks specification has them (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

_PREFIX = "whsec_"
_FEWEST_BYTES = 24


def read_secret(path: Path) -> bytes:
    """The key in a file: `whsec_` and base 64, or plain base 64, of at least 24 bytes.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--webhook-secret-file {path} cannot be read: {error}") from None
    try:
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if len(secret) < _FEWEST_BYTES:
        what = f"must hold {_PREFIX} and at least {_FEWEST_BYTES} random bytes in base 64"
        raise ValueError(f'--webhook-secret-file {path} {what}: echo "{_PREFIX}$(openssl rand -base64 32)"')
    return secret


def signed_headers(secret: bytes, message_id: str, time_s: int, body: bytes) -> dict[str, str]:
    """Headers that prove who sent a body, and when.

    Args:
        secret: shared with the receiver.
        message_id: the same for every attempt, so that a receiver knows a repetition.
        time_s: Unix seconds; receivers refuse old ones.
        body: what is sent.
    """
    signed = f"{message_id}.{time_s}.".encode() + body
    signature = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(time_s),
        "webhook-signature": f"v1,{signature}",
    }
