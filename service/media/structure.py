"""What an image file is made of, found without a decoder.

The walk is bounded whatever the bytes are, and it copies only what the pixels need. So a decoder never sees metadata,
later frames or trailing bytes, and those cost nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from service.core.errors import InvalidImage
from service.media.bmp import read_bmp
from service.media.exif import SIDEWAYS
from service.media.fields import unpack
from service.media.formats import PillowFormat, format_of
from service.media.header import (
    GIF_EXTENSION,
    GIF_FRAME,
    MAX_GIF_BLOCKS,
    MAX_PNG_CHUNKS,
    MAX_WEBP_CHUNKS,
    PNG_SIGNATURE,
    gif_blocks_start,
    header_size,
    orientation_of,
)
from service.media.isobmff import read_iso
from service.media.jpeg import read_jpeg
from service.media.tiff import read_tiff

# Bounds on what is not pixels. Each is far above what encoders write; hostile files are far above the bound.
MAX_METADATA_BYTES = 8_000_000  # of a PNG or a WebP: profiles, EXIF, XMP, texts, unknown chunks
MAX_INFLATION = 1040  # deflate makes at most 1,032 bytes of one

GIF_CONTROL = b"\xf9\x04"  # the label and the length of the block that says what is transparent
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_FRAMES = (b"fcTL", b"fdAT")  # of an animation, after the picture
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_ANIMATED, WEBP_TRANSPARENT, WEBP_METADATA_FLAGS = 0x02, 0x10, 0x2C  # of VP8X; metadata: a profile, EXIF, XMP


@dataclass(frozen=True, slots=True)
class Structure:
    """An image file without all that its pixels do not need."""

    format: PillowFormat
    width: int  # as stored, before EXIF turns the picture
    height: int
    data: bytes
    orientation: int = 1  # EXIF's 1 to 8
    scans: int = 1  # passes over the whole picture
    is_short: bool = False  # the bytes cannot hold so many pixels
    is_negative: bool = False  # Pillow gives black for white


def structure_of(data: bytes, page: int = 1) -> Structure | None:
    """Find what the pixels of the file, or of a page of a TIFF, need; None if it begins like no format that is decoded.

    Raises InvalidImage if the file has more parts than an encoder writes, if it is of a kind that is not read, or if
    its size cannot be read.
    """
    kind = format_of(data)
    if kind is not None and kind.pillow == "TIFF":
        return _tiff(data, page)
    return None if kind is None else WALKS[kind.pillow](data)


def _too_much(kind: str, what: str) -> InvalidImage:
    return InvalidImage(f"the {kind} has {what}: save it anew with an image editor", param="image")


def _sized(structure: Structure) -> Structure:
    if structure.width * structure.height:
        return structure
    raise InvalidImage(
        f"the {structure.format} is damaged or cut short (its width and height cannot be read): send the whole file",
        param="image",
    )


def _png(data: bytes) -> Structure:
    view, width, height = memoryview(data), 0, 0
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    offset, metadata, compressed, raw = len(PNG_SIGNATURE), 0, 0, 0
    for _ in range(MAX_PNG_CHUNKS):
        (length,), name = unpack(">I", data, offset), data[offset + 4 : offset + 8]
        end = offset + 12 + length
        if name in PNG_PIXELS:
            kept.append(view[offset:end])
        elif name not in PNG_FRAMES:
            metadata += length
            if metadata > MAX_METADATA_BYTES:
                raise _too_much("PNG", f"more than {MAX_METADATA_BYTES:,} bytes beside its pixels")
        if name == b"IHDR":
            if width:
                raise _too_much("PNG", "two headers")
            width, height, depth, colours = unpack(">IIBB", data, offset + 8)
            raw = height * (1 + width * PNG_CHANNELS.get(colours, 1) * depth // 8)
        elif not width:
            break  # the header comes first
        elif name == b"IDAT":
            compressed += min(length, len(data) - offset)
        if name == b"IEND" or end >= len(data):
            break
        offset = end
    else:
        raise _too_much("PNG", f"more than {MAX_PNG_CHUNKS:,} chunks")
    is_short = raw > MAX_INFLATION * (compressed + 64)
    return _sized(Structure("PNG", width, height, b"".join(kept), orientation_of(data), is_short=is_short))


def _jpeg(data: bytes) -> Structure:
    found = read_jpeg(data)
    return _sized(Structure("JPEG", found.width, found.height, found.data, orientation_of(data), found.scans))


def _gif(data: bytes) -> Structure:
    """The header, the first frame's own control block, and all from that frame on: a decoder reads no further."""
    offset = start = gif_blocks_start(data)
    control, inside = b"", False
    for _ in range(MAX_GIF_BLOCKS):
        (block,) = unpack("<B", data, offset)
        if inside:  # this is a length, and 0 ends it
            inside = block > 0
            offset += 1 + block
        elif block == GIF_EXTENSION:
            if data[offset + 1 : offset + 3] == GIF_CONTROL:
                control = data[offset : offset + 7] + b"\0"
            inside = True
            offset += 2
        elif block == GIF_FRAME:
            width, height = header_size(data) or (0, 0)
            return _sized(Structure("GIF", width, height, data[:start] + control + data[offset:]))
        else:
            return _sized(Structure("GIF", 0, 0, b""))
    raise _too_much("GIF", f"more than {MAX_GIF_BLOCKS:,} blocks of comments or extensions before its first picture")


def _iso(data: bytes) -> Structure:
    """An AVIF's decoder leaves the turn to us; a HEIC's turns and cuts the picture itself."""
    found = read_iso(data)
    orientation = orientation_of(data)
    if found.format == "AVIF":
        return _sized(Structure("AVIF", found.width, found.height, found.data, orientation))
    width, height = (found.height, found.width) if orientation in SIDEWAYS else (found.width, found.height)
    return _sized(Structure("HEIF", width, height, found.data))


def _tiff(data: bytes, page: int = 1) -> Structure:
    found = read_tiff(data, page)
    width, height, orientation = found.width, found.height, orientation_of(data, page)
    structure = Structure(
        "TIFF", width, height, found.data, orientation, is_short=found.is_short, is_negative=found.is_negative
    )
    return _sized(structure)


def _bmp(data: bytes) -> Structure:
    found = read_bmp(data)
    return _sized(Structure("BMP", found.width, found.height, found.data, is_short=found.is_short))


def kept_webp_flags(flags: int) -> int:
    """Return the flags of VP8X for a decoder.

    What no picture of an animation covers is transparent, even if each picture is opaque.
    """
    return (flags | WEBP_TRANSPARENT if flags & WEBP_ANIMATED else flags) & ~WEBP_METADATA_FLAGS


def _webp(data: bytes) -> Structure:
    """The first frame. The file's end is where its header says."""
    view, metadata, frames = memoryview(data), 0, 0
    kept: list[bytes | memoryview] = []
    (length,) = unpack("<I", data, 4)
    offset, last = 12, 8 + length
    width, height = header_size(data) or (0, 0)
    orientation = orientation_of(data)
    if last > len(data):
        return _sized(Structure("WEBP", width, height, b"", orientation, is_short=True))
    for _ in range(MAX_WEBP_CHUNKS):
        if offset + 8 > last:
            break
        name, (length,) = data[offset : offset + 4], unpack("<I", data, offset + 4)
        end = offset + 8 + length + length % 2
        frames += name == b"ANMF"
        if name == b"VP8X":
            (flags,) = unpack("<B", data, offset + 8)
            kept.append(data[offset : offset + 8] + bytes([kept_webp_flags(flags)]))
            kept.append(view[offset + 9 : min(end, last)])
        elif name in WEBP_PIXELS:
            if name != b"ANMF" or frames == 1:
                kept.append(view[offset : min(end, last)])
        else:
            metadata += length
        if metadata > MAX_METADATA_BYTES:
            raise _too_much("WebP", f"more than {MAX_METADATA_BYTES:,} bytes beside its pixels")
        offset = end
    else:
        raise _too_much("WebP", f"more than {MAX_WEBP_CHUNKS:,} chunks")
    body = b"".join(kept)
    whole = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    return _sized(Structure("WEBP", width, height, whole, orientation))


WALKS: dict[PillowFormat, Callable[[bytes], Structure]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "WEBP": _webp,
    "GIF": _gif,
    "AVIF": _iso,
    "HEIF": _iso,
    "TIFF": _tiff,
    "BMP": _bmp,
}
