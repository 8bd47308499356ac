"""The formats that are decoded, in one place: their names, and how a file of each begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PillowFormat = Literal["PNG", "JPEG", "WEBP", "GIF"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of image files."""

    name: str  # as texts write it
    pillow: PillowFormat  # as Pillow names it
    start: bytes
    brands: tuple[bytes, ...] = ()  # of which one must stand at `brand_at`; none: `start` says enough
    brand_at: int = 8

    def begins(self, data: bytes) -> bool:
        """Whether the file begins like one of this format."""
        if not data.startswith(self.start):
            return False
        return not self.brands or data[self.brand_at : self.brand_at + len(self.brands[0])] in self.brands


FORMATS = (
    Format("PNG", "PNG", b"\x89PNG\r\n\x1a\n"),
    Format("JPEG", "JPEG", b"\xff\xd8"),
    Format("WebP", "WEBP", b"RIFF", (b"WEBP",)),
    Format("GIF", "GIF", b"GIF8", (b"7a", b"9a"), brand_at=4),
)


def format_of(data: bytes) -> Format | None:
    """Return the format that the file begins like, or None."""
    return next((each for each in FORMATS if each.begins(data)), None)


NAMES = " or ".join((", ".join(each.name for each in FORMATS[:-1]), FORMATS[-1].name))
SENT = f"send {NAMES}"
