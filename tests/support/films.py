"""Short videos of a square that moves from left to right, one step a frame."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from typing import Literal

import av
import numpy as np
from PIL import Image as Pillow

SIDE = 112  # pixels
FRAMES_PER_S = 5


def frame(index: int, count: int) -> Pillow.Image:
    """The frame at `index` of `count`: a red square on white."""
    picture = Pillow.new("RGB", (SIDE, SIDE), "white")
    left = round(index * (SIDE - 32) / max(count - 1, 1))
    picture.paste((220, 30, 40), (left, 40, left + 32, 72))
    return picture


def gif(count: int = 4) -> bytes:
    """A GIF that repeats; one that stands still for a single frame."""
    first, *others = (frame(index, count) for index in range(count))
    out, moving = BytesIO(), {"loop": 0} if others else {}
    first.save(out, "GIF", save_all=True, append_images=others, duration=1000 // FRAMES_PER_S, **moving)
    return out.getvalue()


def video(count: int = 10, container: Literal["mp4", "webm"] = "webm") -> bytes:
    """An MP4 (H.264) or a WebM (VP8)."""
    out = BytesIO()
    with av.open(out, "w", format=container) as film:
        stream = film.add_stream("libvpx" if container == "webm" else "libx264", rate=FRAMES_PER_S)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_S)
        for index in range(count):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame(index, count)), format="rgb24")))
        film.mux(stream.encode())
    return out.getvalue()
