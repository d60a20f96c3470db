"""Bodies of requests, and the key that makes a repeated one safe."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from starlette.requests import Request

from shared.errors import InvalidRequest

IDEMPOTENCY_HEADER = "idempotency-key"
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAX_KEY_CHARACTERS = 255


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        InvalidRequest: it is none.
    """
    body = await request.body()
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("body", f"is no JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise InvalidRequest.of("body", f"got a JSON {type(value).__name__}, allowed is an object")
    return value


def request_id_of(request: Request, longest: int = 128) -> str:
    """The request_id that an Idempotency-Key stands for; empty without one.

    A key that is no plain word of at most `longest` characters is hashed.

    Raises:
        InvalidRequest: longer than 255 characters.
    """
    key = request.headers.get(IDEMPOTENCY_HEADER, "")
    if len(key) > _MAX_KEY_CHARACTERS:
        what = f"got {len(key)} characters, allowed is at most {_MAX_KEY_CHARACTERS}"
        raise InvalidRequest.of("Idempotency-Key", what)
    if not key or (len(key) <= longest and _PLAIN.fullmatch(key)):
        return key
    return f"key-{hashlib.sha256(key.encode()).hexdigest()}"
