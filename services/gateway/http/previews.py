"""Pictures of finished clips: a thumbnail and a sheet of frames, made when first asked for and kept beside the clip."""

from __future__ import annotations

import asyncio
import enum
import io
from collections.abc import Callable, Iterator

import av
from PIL import Image

from shared.errors import CorruptTensor

_SHEET_COLUMNS, _SHEET_ROWS = 5, 5
_CELL_PIXELS = 256
"""Longest side of a frame in the sheet."""
_THUMBNAIL_PIXELS = 512
_AT_ONCE = 2
"""Clips decoded at the same time: each takes a core for a second or two."""


class Preview(enum.Enum):
    """Kinds of pictures; values are what OpenAI's API calls them."""

    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"

    @property
    def file_name(self) -> str:
        """Beside the clip."""
        return "thumbnail.webp" if self is Preview.THUMBNAIL else "spritesheet.jpg"

    @property
    def media_type(self) -> str:
        """For the answer."""
        return "image/webp" if self is Preview.THUMBNAIL else "image/jpeg"


class PreviewMaker:
    """Makes previews in threads, few at once."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def make(self, job_id: str, read: Callable[[str], bytes], preview: Preview) -> bytes:
        """The picture file of a job's mp4, which is read when it is this one's turn.

        Raises:
            CorruptTensor: the clip cannot be decoded.
        """
        async with self._turns:
            return await asyncio.to_thread(lambda: picture_of(job_id, read(job_id), preview))


def picture_of(job_id: str, clip: bytes, preview: Preview) -> bytes:
    """Draw the middle frame of a job's mp4 as WebP, or 5 x 5 frames spread evenly over it, row by row, as JPEG.

    Raises:
        CorruptTensor: the clip cannot be decoded.
    """
    try:
        with av.open(io.BytesIO(clip), "r") as container:
            count = container.streams.video[0].frames
            if preview is Preview.THUMBNAIL:
                return _encoded(_thumbnail(container, count), "WEBP")
            return _encoded(_sheet(container, count), "JPEG")
    except (av.FFmpegError, IndexError) as error:
        raise CorruptTensor(f"the clip of {job_id} cannot be decoded ({error}); create the job again") from None


def _thumbnail(container: av.container.InputContainer, count: int) -> Image.Image:
    picture = next(_frames(container, [count // 2]), None)
    if picture is None:
        raise IndexError("it has no frames")
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return picture


def _sheet(container: av.container.InputContainer, count: int) -> Image.Image:
    cells = _SHEET_COLUMNS * _SHEET_ROWS
    wanted = [number * max(0, count - 1) // (cells - 1) for number in range(cells)]
    sheet: Image.Image | None = None
    width = height = 0
    for number, picture in enumerate(_frames(container, wanted)):
        picture.thumbnail((_CELL_PIXELS, _CELL_PIXELS))
        if sheet is None:
            width, height = picture.size
            sheet = Image.new("RGB", (width * _SHEET_COLUMNS, height * _SHEET_ROWS))
        sheet.paste(picture, (number % _SHEET_COLUMNS * width, number // _SHEET_COLUMNS * height))
    if sheet is None:
        raise IndexError("it has no frames")
    return sheet


def _frames(container: av.container.InputContainer, wanted: list[int]) -> Iterator[Image.Image]:
    """The frames of these numbers, which ascend and may repeat."""
    position = 0
    for number, frame in enumerate(container.decode(video=0)):
        while position < len(wanted) and wanted[position] == number:
            yield frame.to_image()
            position += 1
        if position == len(wanted):
            return


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return file.getvalue()
