"""Walk a BMP. It is not compressed, so its bytes say how many pixels it has.

Source: Microsoft's BITMAPFILEHEADER and BITMAPINFOHEADER.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.core.errors import InvalidImage
from service.media.fields import unpack

CORE_HEADER = 12  # bytes of the oldest header, which has 16-bit sizes
HEADERS = (CORE_HEADER, 40, 52, 56, 64, 108, 124)
UNCOMPRESSED = (0, 3)  # 3: with masks that say where the colours are
DEPTHS = (1, 4, 8, 16, 24, 32)
MAX_START = 65_536  # where the pixels begin: behind header, masks and at most 256 colours


@dataclass(frozen=True, slots=True)
class Bmp:
    width: int
    height: int
    data: bytes  # to the last pixel
    is_short: bool


def bmp_size(data: bytes) -> tuple[int, int]:
    """Width and height; zeros if they cannot be read."""
    if unpack("<I", data, 14) == (CORE_HEADER,):
        width, height = unpack("<HH", data, 18)
    else:
        width, height = unpack("<ii", data, 18)
    return max(width, 0), abs(height)  # the height of a picture that begins at the top is negative


def read_bmp(data: bytes) -> Bmp:
    """Raises InvalidImage if it is compressed, or has a header that is not known."""
    (start, header), (width, height) = unpack("<II", data, 10), bmp_size(data)
    is_core = header == CORE_HEADER
    (depth,) = unpack("<H", data, 24 if is_core else 28)
    (compression,) = (0,) if is_core else unpack("<I", data, 30)
    if header not in HEADERS or depth not in DEPTHS or compression not in UNCOMPRESSED or start > MAX_START:
        raise InvalidImage("the BMP is compressed or of a rare kind, which is not read: save it as PNG", param="image")
    end = start + (width * depth + 31) // 32 * 4 * height
    return Bmp(width, height, data[:end], is_short=end > len(data) or start < 14 + header)
