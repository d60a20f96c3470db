"""First pictures as HTTP clients send them: data URLs and parts of forms. Bounded before they are decoded."""

from __future__ import annotations

import base64
import binascii
import re

from services.gateway.engine import GatewayEngine
from services.gateway.images import ImageInfo
from shared.errors import InvalidRequest
from shared.pictures import MAX_PICTURE_BYTES

MAX_DATA_URL_CHARACTERS = MAX_PICTURE_BYTES // 3 * 4 + 128
"""Of the largest picture in base 64, with its head."""
_DATA_URL = re.compile(r"data:[a-zA-Z0-9.+/-]{0,100}(?:;[a-zA-Z0-9=._+-]{1,100})*;base64,")


def is_data_url(text: str) -> bool:
    """Whether a text says of itself that it is a data URL."""
    return text[:5].lower() == "data:"


def picture_of_data_url(text: str, *, field: str) -> bytes:
    """The bytes of a base-64 data URL; what it says of their type is not believed.

    Raises:
        InvalidRequest: too long, or of another form.
    """
    if len(text) > MAX_DATA_URL_CHARACTERS:
        what = f"got a data URL of {len(text)} characters, allowed is a picture of at most {MAX_PICTURE_BYTES} bytes"
        raise InvalidRequest.of(field, what)
    head = _DATA_URL.match(text)
    if head is None:
        raise InvalidRequest.of(field, f"got {text[:40]!r}, allowed is data:image/png;base64,... (or jpeg, webp)")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest.of(field, "is a data URL with damaged base 64") from None


async def keep_picture(engine: GatewayEngine, data: bytes, *, field: str) -> ImageInfo:
    """Keep a first picture.

    Raises:
        InvalidRequest: not a picture, damaged, or too large; names `field`.
        DiskFull: there is no space to keep it.
    """
    try:
        return await engine.keep_image(data)
    except InvalidRequest as error:
        raise InvalidRequest.of(field, "; ".join(violation.description for violation in error.violations)) from None


async def image_id_of(engine: GatewayEngine, text: str, *, field: str) -> str:
    """The id of a picture that came as a data URL, or the text itself: then it is an upload id, which is checked later.

    Raises:
        InvalidRequest: a data URL that is none, or no picture; or any other URL, since pictures are not fetched.
    """
    if is_data_url(text):
        return (await keep_picture(engine, picture_of_data_url(text, field=field), field=field)).id
    if "://" in text[:64]:
        what = f"got {text[:80]!r}, allowed is a data URL or an upload id; addresses of others are not fetched"
        raise InvalidRequest.of(field, what)
    return text
