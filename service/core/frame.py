"""Define the square of an image's plane that the vision encoder sees, if it does not see the whole image squashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

Fit = Literal["squash", "pad"]  # how an image that is not square meets the square encoder
AskedFit = Literal["squash", "pad", "auto"]  # auto: squash if the image is almost square
Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]

WHOLE: Area = (0.0, 0.0, 1.0, 1.0)
ALMOST_SQUARE = 1.2  # the longer side over the shorter one, up to which `auto` squashes


@dataclass(frozen=True, slots=True)
class Frame:
    """A square, in pixels of the upright image. What lies outside the image is padding of one colour."""

    left: int
    top: int
    side: int
    width: int  # of the whole image, upright
    height: int
    colour: Colour  # R, G, B

    @classmethod
    def around(cls, width: int, height: int, colour: Colour) -> Self:
        """Put the whole image into the middle of its square."""
        side = max(width, height)
        return cls(-((side - width) // 2), -((side - height) // 2), side, width, height, colour)

    @property
    def fit(self) -> Fit:
        return "pad"

    @property
    def area(self) -> Area:
        """Return left, top, right and bottom as shares of the image's width and height.

        Padding lies below 0 and above 1.
        """
        right, bottom = self.left + self.side, self.top + self.side
        return self.left / self.width, self.top / self.height, right / self.width, bottom / self.height

    @property
    def suffix(self) -> str:
        """Return what a cache key adds to the image's digest."""
        return f".{self.left},{self.top},{self.side},{bytes(self.colour).hex()}"


def is_almost_square(width: int, height: int) -> bool:
    return max(width, height) <= ALMOST_SQUARE * min(width, height)


def frame_of(width: int, height: int, fit: AskedFit, colour: Colour) -> Frame | None:
    """Return the square to look at, or None to squash the image. A square image is the same either way."""
    if fit == "squash" or width == height or (fit == "auto" and is_almost_square(width, height)):
        return None
    return Frame.around(width, height, colour)


def framed(digest: str, frame: Frame | None) -> str:
    """Return the digest that cache keys have for what is seen of an image."""
    return digest if frame is None else digest + frame.suffix
