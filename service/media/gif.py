"""Draw the frames of a GIF as browsers do: each in its place on a canvas that is transparent where none was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO

from PIL import Image as Pillow

from service.media.colours import in_colour
from service.media.fields import unpack

TO_BACKGROUND, TO_PREVIOUS = 2, 3  # of the ways to dispose of a frame; the numbers behind are read as the last
CLEAR = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class GifFrame:
    """Parts of the file: all before its blocks, the frame's control block or nothing, and the frame."""

    head: bytes
    control: bytes
    frame: memoryview

    @property
    def place(self) -> tuple[int, int]:
        """Return the left and the upper side."""
        left, top = unpack("<HH", self.frame, 1)
        return left, top

    @property
    def disposal(self) -> int:
        return self.control[3] >> 2 & 7 if self.control else 0

    @property
    def alone(self) -> bytes:
        """Return a GIF of this frame alone, which is as large as the frame."""
        size = self.frame[5:9]
        return b"".join(
            (self.head[:6], size, self.head[10:], self.control, self.frame[:1], bytes(4), self.frame[5:], b";")
        )


def drawn(frames: Iterable[GifFrame], width: int, height: int) -> Iterator[Pillow.Image]:
    """Draw one frame after the other -> the RGBA canvas after each, which changes with the next. Pillow may raise."""
    canvas = Pillow.new("RGBA", (width, height), CLEAR)
    for frame in frames:
        before = canvas.copy() if frame.disposal >= TO_PREVIOUS else canvas
        with Pillow.open(BytesIO(frame.alone), formats=("GIF",)) as picture:
            part = in_colour(picture)
        left, top = frame.place
        canvas.paste(part, (left, top), part if part.mode == "RGBA" else None)
        yield canvas
        if frame.disposal == TO_BACKGROUND:
            canvas.paste(CLEAR, (left, top, left + part.width, top + part.height))
        canvas = before
