"""Pictures from strangers: what is taken looks right, what is not is refused by name before it costs memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from shared.errors import InvalidRequest
from shared.pictures import MAX_PICTURE_BYTES, open_picture


def _encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _gradient(height: int = 40, width: int = 60) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], -1).astype(np.uint8))


def _png_claiming(width: int, height: int) -> bytes:
    """A tiny, valid PNG whose header announces width x height 1-bit pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose frame header (SOF0: marker, length, precision, height, width) announces another size."""
    data = bytearray(_encode(Image.new("L", (8, 8)), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def _webp_claiming(width: int, height: int) -> bytes:
    body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"lossless": True, "exif": b"Exif\0\0"})]
)
def test_lossless_pictures_come_back_exactly(kind: str, options: dict[str, object]) -> None:
    picture = open_picture(_encode(_gradient(), kind, **options), field="image")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(_gradient()))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_pictures_come_back_nearly(kind: str) -> None:
    picture = open_picture(_encode(_gradient(), kind, quality=95), field="image")
    difference = np.abs(np.asarray(picture, np.int32) - np.asarray(_gradient(), np.int32))
    assert difference.mean() < 4


def test_exif_orientation_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise to see it upright
    picture = open_picture(_encode(_gradient(), "PNG", exif=exif), field="image")
    assert np.array_equal(np.asarray(picture), np.rot90(np.asarray(_gradient()), k=-1))


def test_alpha_is_laid_over_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:2, :, 3] = 255
    rgba[2, :, 3] = 51  # one fifth
    pixels = np.asarray(open_picture(_encode(Image.fromarray(rgba), "PNG"), field="image"))
    assert (pixels[:2] == [200, 0, 0]).all()
    assert (pixels[2] == [244, 204, 204]).all()
    assert (pixels[3] == 255).all()


def test_palette_transparency_is_laid_over_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    pixels = np.asarray(open_picture(_encode(picture, "PNG", transparency=0), field="image"))
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 257 * 100, 65535]], np.uint16)
    pixels = np.asarray(open_picture(_encode(Image.fromarray(values), "PNG"), field="image"))
    assert pixels[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_png_claiming(10_000, 10_000), id="png-100MP"),
        pytest.param(_png_claiming(2**31 - 1, 2**31 - 1), id="png-largest"),
        pytest.param(_png_claiming(60_000, 60_000), id="png-3.6GP"),
        pytest.param(_jpeg_claiming(10_000, 10_000), id="jpeg-100MP"),
        pytest.param(_jpeg_claiming(65_535, 65_535), id="jpeg-largest"),
        pytest.param(_webp_claiming(16_383, 16_383), id="webp-268MP"),
        pytest.param(_webp_claiming(2**24, 2**24), id="webp-largest"),
        pytest.param(_encode(Image.new("L", (8_000, 7_000)), "JPEG"), id="jpeg-56MP"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_before_decoding(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as caught:
            open_picture(data, field="image")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert [v.field for v in caught.value.violations] == ["image"]
    assert "pixels" in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello, this is no picture", id="text"),
        pytest.param(_encode(_gradient(), "GIF"), id="gif"),
        pytest.param(_encode(_gradient(), "BMP"), id="bmp"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="svg"),
        pytest.param(_encode(_gradient(), "PNG")[:-40], id="png-truncated"),
        pytest.param(_encode(_gradient(), "PNG")[:20], id="png-header-only"),
        pytest.param(_encode(_gradient(400, 400), "JPEG")[:3000], id="jpeg-truncated"),
        pytest.param(b"\xff\xd8\xff", id="jpeg-magic-only"),
        pytest.param(_encode(_gradient(), "WEBP")[:-30], id="webp-truncated"),
        pytest.param(b"RIFF\0\0\0\0WEBP", id="webp-magic-only"),
        pytest.param(_webp_claiming(100, 100), id="webp-without-frame"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(MAX_PICTURE_BYTES), id="too-many-bytes"),
    ],
)
def test_bad_files_are_refused_by_field(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_picture(data, field="first_image")
    assert [v.field for v in caught.value.violations] == ["first_image"]
