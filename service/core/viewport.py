"""Define the square of an image's plane that the vision encoder sees, if it does not see the whole image squashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

Fit = Literal["squash", "pad", "tiles"]  # how an image that is not square meets the square encoder
AskedFit = Literal["squash", "pad", "tiles", "auto"]  # auto: tiles if the image is far from square, else squash
Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]

WHOLE: Area = (0.0, 0.0, 1.0, 1.0)
ALMOST_SQUARE = 1.2  # the longer side over the shorter one, up to which an image has no tiles
# From here on `auto` tiles. Below it, tiles read no better than the squashed image: docs/measurements.md.
FAR_FROM_SQUARE = 1.5
MOST_TILES = 12


@dataclass(frozen=True, slots=True)
class Viewport:
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
        return "pad" if self.side >= max(self.width, self.height) else "tiles"

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


class Fitting(NamedTuple):
    """How an image is looked at: what is seen first, and the tiles of which the question may choose one then."""

    viewport: Viewport | None = None  # None: the whole image, squashed
    tiles: tuple[Viewport, ...] = ()


def fitting(width: int, height: int, fit: AskedFit, colour: Colour) -> Fitting:
    """Fit an upright image. A square image is the same whatever the fit is; it has neither viewport nor tiles."""
    if fit == "pad" and width != height:
        return Fitting(Viewport.around(width, height, colour))
    if fit == "tiles" or (fit == "auto" and max(width, height) > FAR_FROM_SQUARE * min(width, height)):
        return Fitting(None, tiles_of(width, height, colour))
    return Fitting()


def tiles_of(width: int, height: int, colour: Colour) -> tuple[Viewport, ...]:
    """Cover a page with squares along its longer side, each half over the next: 2 to MOST_TILES, or none.

    A tile is as wide as the page. On a page of more than 6.5 to 1 it is wider, and padded.
    """
    shorter, longer = sorted((width, height))
    if longer <= ALMOST_SQUARE * shorter:
        return ()
    side = max(shorter, -(-2 * longer // (MOST_TILES + 1)))
    last = -(-2 * longer // side) - 2
    across = -((side - shorter) // 2)
    along = [round(number * (longer - side) / last) for number in range(last + 1)]
    places = [(across, start) if height > width else (start, across) for start in along]
    return tuple(Viewport(left, top, side, width, height, colour) for left, top in places)


def viewed(digest: str, viewport: Viewport | None) -> str:
    """Return the digest that cache keys have for what is seen of an image."""
    return digest if viewport is None else digest + viewport.suffix
