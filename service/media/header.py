"""Read an image's size, and how it is turned, from the file's headers.

Pixels are skipped, nothing is decoded or copied, and the number of steps is bounded. So these functions may run on the
event loop, however large and hostile the file is. The decoder asks here too, so it turns a picture as they say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from service.core.errors import InvalidImage
from service.media.bmp import bmp_size
from service.media.exif import SIDEWAYS, exif_orientation
from service.media.fields import unpack
from service.media.formats import format_of, reads_as_pdf
from service.media.isobmff import iso_orientation, iso_size
from service.media.jpeg import jpeg_orientation, jpeg_size
from service.media.pages import MAX_TIFF_PAGES, page_not_found
from service.media.tiff import tiff_orientation, tiff_pages, tiff_size

MAX_PNG_CHUNKS = 16_384  # 20 MB in chunks of 8 KiB, as libpng writes them, are 2,442
MAX_WEBP_CHUNKS = 16_384
MAX_GIF_BLOCKS = 4096  # before the first frame; XMP of 100 KB takes about 1,500
GIF_EXTENSION, GIF_FRAME = 0x21, 0x2C
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK = struct.Struct(">I4s")
WEBP_CHUNK = struct.Struct("<4sI")


def header_size(data: bytes, page: int = 1) -> tuple[int, int] | None:
    """Read width and height from the file's first bytes, before EXIF turns the picture.

    (0, 0) if the file begins like no format that is decoded; None if it does but its size cannot be read, as a PDF's
    never can. `decode` refuses a picture that is larger. Only a TIFF has a second page.
    """
    kind = format_of(data)
    if kind is None:
        return None if reads_as_pdf(data) else (0, 0)
    try:
        width, height = tiff_size(data, page) if kind.pillow == "TIFF" else SIZES[kind.pillow](data)
    except InvalidImage:  # its walk ended at a limit; decode says at which
        return None
    return (width, height) if width * height else None


def upright_size(data: bytes, page: int = 1) -> tuple[int, int] | None:
    """Return width and height as the picture is turned before it is seen; None and zeros are those of `header_size`."""
    size = header_size(data, page)
    return size[::-1] if size is not None and orientation_of(data, page) in SIDEWAYS else size


def page_count(data: bytes) -> int | None:
    """Count the pages; None if only the decoder can, as of a PDF, or if it refuses the file."""
    kind = format_of(data)
    if kind is None:
        return None
    try:
        return tiff_pages(data) if kind.pillow == "TIFF" else 1
    except InvalidImage:  # of a kind that is not read; decode says so
        return None


def require_page(data: bytes, page: int) -> None:
    """Raises InvalidImage if it is known that the file has no such page."""
    if page == 1:
        return
    pages = page_count(data)
    if page > MAX_TIFF_PAGES == pages:
        raise InvalidImage(
            f"page is {page:,}, and of a TIFF the first {pages:,} are read: save it in parts, or as a PDF",
            param="page",
            code="page_not_found",
        )
    if pages is not None and page > pages:
        raise page_not_found(page, pages)


def orientation_of(data: bytes, page: int = 1) -> int:
    """Return EXIF's 1 to 8, of a HEIF or AVIF what its properties say; 1 if nothing is told or it cannot be read."""
    kind = format_of(data)
    try:
        if kind is not None and kind.pillow == "TIFF":
            return tiff_orientation(data, page)
        return 1 if kind is None or kind.pillow not in ORIENTATIONS else ORIENTATIONS[kind.pillow](data)
    except InvalidImage:  # its walk ended at a limit; decode says at which
        return 1


def _png_size(data: bytes) -> tuple[int, ...]:
    return unpack(">II", data, 16) if data[12:16] == b"IHDR" else (0, 0)


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


def _png_orientation(data: bytes) -> int:
    """The chunk may stand behind the pixels."""
    offset = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if offset + PNG_CHUNK.size > len(data):
            break
        length, name = PNG_CHUNK.unpack_from(data, offset)
        if name == b"eXIf" and length:
            return exif_orientation(memoryview(data)[offset + 8 : offset + 8 + length])
        if name == b"IEND":
            break
        offset += 12 + length
    return 1


def _webp_orientation(data: bytes) -> int:
    (length,) = unpack("<I", data, 4)
    offset, last = 12, min(8 + length, len(data))
    for _ in range(MAX_WEBP_CHUNKS):
        if offset + WEBP_CHUNK.size > last:
            break
        name, length = WEBP_CHUNK.unpack_from(data, offset)
        if name == b"EXIF" and length:
            return exif_orientation(memoryview(data)[offset + 8 : offset + 8 + length])
        offset += 8 + length + length % 2
    return 1


SIZES: dict[str, Callable[[bytes], tuple[int, ...]]] = {
    "PNG": _png_size,
    "JPEG": jpeg_size,
    "WEBP": _webp_size,
    "GIF": _gif_size,
    "AVIF": iso_size,
    "HEIF": iso_size,
    "TIFF": tiff_size,
    "BMP": bmp_size,
}
ORIENTATIONS: dict[str, Callable[[bytes], int]] = {  # GIF and BMP have none
    "PNG": _png_orientation,
    "JPEG": jpeg_orientation,
    "WEBP": _webp_orientation,
    "AVIF": iso_orientation,
    "HEIF": iso_orientation,
    "TIFF": tiff_orientation,
}
