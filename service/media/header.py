"""Read an image's size from the file's first bytes. Nothing is decoded, so hostile bytes cost microseconds."""

from __future__ import annotations

from collections.abc import Callable

from service.core.errors import InvalidImage
from service.media.bmp import bmp_size
from service.media.fields import unpack
from service.media.formats import format_of
from service.media.isobmff import iso_size
from service.media.tiff import tiff_size

MAX_JPEG_SEGMENTS = 1024  # cameras write about ten; a profile or XMP of 8 MB takes 123
MAX_GIF_BLOCKS = 4096  # before the first frame; XMP of 100 KB takes about 1,500
GIF_EXTENSION, GIF_FRAME = 0x21, 0x2C
JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2, 0xFFC3, 0xFFC5, 0xFFC6, 0xFFC7, 0xFFC9, 0xFFCA, 0xFFCB, 0xFFCD, 0xFFCE, 0xFFCF)


def header_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height from the file's first bytes, before EXIF turns the picture.

    (0, 0) if the file begins like no format that is decoded; None if it does but its size cannot be read. `decode`
    refuses a picture that is larger.
    """
    kind = format_of(data)
    if kind is None:
        return 0, 0
    try:
        width, height = SIZES[kind.pillow](data)
    except InvalidImage:  # its walk ended at a limit; decode says at which
        return None
    return (width, height) if width * height else None


def _png_size(data: bytes) -> tuple[int, ...]:
    return unpack(">II", data, 16) if data[12:16] == b"IHDR" else (0, 0)


def _jpeg_size(data: bytes) -> tuple[int, ...]:
    """Read the frame header, which follows at most MAX_JPEG_SEGMENTS other segments."""
    offset = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        marker, length = unpack(">HH", data, offset)
        if marker in JPEG_FRAMES:
            return unpack(">HH", data, offset + 5)
        if marker == 0xFFFF:  # fill bytes
            offset += 1
        elif marker < 0xFF01 or length < 2:
            break
        else:
            offset += 2 + length
    return 0, 0


def gif_blocks_start(data: bytes) -> int:
    """Where a GIF's blocks begin: after its header and its colour table."""
    (flags,) = unpack("<B", data, 10)
    return 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def _gif_size(data: bytes) -> tuple[int, ...]:
    """The size that holds both the screen and the first frame, which may be larger than the screen."""
    width, height = unpack("<HH", data, 6)
    offset = gif_blocks_start(data)
    in_extension = False
    for _ in range(MAX_GIF_BLOCKS):
        (block,) = unpack("<B", data, offset)
        if in_extension:  # this is a length, and 0 ends it
            in_extension = block > 0
            offset += 1 + block
        elif block == GIF_EXTENSION:
            in_extension = True
            offset += 2
        elif block == GIF_FRAME:
            left, top, frame_width, frame_height = unpack("<HHHH", data, offset + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            break
    return 0, 0


def _webp_size(data: bytes) -> tuple[int, ...]:
    match data[12:16]:
        case b"VP8 ":
            width, height = unpack("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            bits, _ = unpack("<IB", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            low, high, low_height, high_height = unpack("<HBHB", data, 24)
            return (low | high << 16) + 1, (low_height | high_height << 16) + 1
    return 0, 0


SIZES: dict[str, Callable[[bytes], tuple[int, ...]]] = {
    "PNG": _png_size,
    "JPEG": _jpeg_size,
    "WEBP": _webp_size,
    "GIF": _gif_size,
    "AVIF": iso_size,
    "HEIF": iso_size,
    "TIFF": tiff_size,
    "BMP": bmp_size,
}
