"""Opening pictures that strangers send: sniffed, bounded before anything is decoded, upright, RGB."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared.errors import InvalidRequest

MAX_PICTURE_BYTES = 32 << 20
"""Largest file taken."""
MAX_PICTURE_PIXELS = 50_000_000
"""Largest picture taken, counted from its header before a pixel is decoded."""

_ALLOWED = "PNG, JPEG and WebP"
_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
}
"""Used directly: Image.open has a bound of its own, about which it warns on the terminal before ours is asked."""
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files; UnidentifiedImageError is an OSError."""


def sniff_format(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes, whatever the file is called; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def open_picture(data: bytes, *, field: str) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file: mode RGB, turned upright by its EXIF orientation, alpha laid over white.

    The size is checked before pixels are decoded, so that a small file cannot ask for a large allocation. Of an
    animation the first frame is taken.

    Args:
        data: the whole file.
        field: name of the request's field, for errors.

    Raises:
        InvalidRequest: empty, over 32 MiB, over 50 megapixels, of another format, truncated or damaged.
    """
    if not data:
        raise InvalidRequest.of(field, f"got no bytes, allowed is a {_ALLOWED} file")
    if len(data) > MAX_PICTURE_BYTES:
        raise InvalidRequest.of(field, f"got {len(data)} bytes, allowed is at most {MAX_PICTURE_BYTES}")
    kind = sniff_format(data)
    if kind is None:
        raise InvalidRequest.of(field, f"is no picture (begins with {data[:8]!r}), allowed is {_ALLOWED}")
    if kind == "WEBP":
        # Pillow allocates a WebP's whole canvas on opening it, before its size can be asked for.
        _check_size(_webp_size(data, field), field)
    try:
        with _READERS[kind](io.BytesIO(data)) as opened:
            _check_size(opened.size, field)
            opened.load()
            return _flatten(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError:
        raise InvalidRequest.of(field, f"has too many pixels, allowed is at most {MAX_PICTURE_PIXELS}") from None
    except _DECODER_ERRORS as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InvalidRequest.of(field, f"is a damaged or truncated {kind} file ({reason}); save it again") from None


def _check_size(size: tuple[int, int], field: str) -> None:
    width, height = size
    if width < 1 or height < 1 or width * height > MAX_PICTURE_PIXELS:
        what = f"got {width}x{height} pixels, allowed is 1 to {MAX_PICTURE_PIXELS} pixels; make the picture smaller"
        raise InvalidRequest.of(field, what)


def _webp_size(data: bytes, field: str) -> tuple[int, int]:
    """(width, height) by the header of the first chunk: extended, lossless or lossy (RFC 9649, section 2)."""
    chunk = data[12:16]
    if len(data) >= 30:
        if chunk == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        if chunk == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    raise InvalidRequest.of(field, "is a damaged or truncated WEBP file (no image header); save it again")


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "I;16", "I;16B", "F"):
        # 16-bit grey: converting straight to 8 bits would clip instead of scale.
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
