"""Small real clips and pictures."""

from __future__ import annotations

import functools
import io

import av
import numpy as np
from PIL import Image

from tests.grpc.scripted_stages import NUM_FRAMES

SIDE = 64


@functools.cache
def tiny_clip() -> bytes:
    """An mp4 of 64 x 64 whose frames grow brighter from black to white."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(NUM_FRAMES):
            level = np.full((SIDE, SIDE, 3), number * 255 // (NUM_FRAMES - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def picture(width: int = 64, height: int = 64, kind: str = "PNG") -> bytes:
    """A red picture file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()
