"""What an image file is made of, found without a decoder.

The walk is bounded whatever the bytes are, and it copies only what the pixels need. So a decoder never sees metadata,
later frames or trailing bytes, and what those cost is known before: nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from service.core.errors import InvalidImage
from service.media.bmp import read_bmp
from service.media.fields import unpack
from service.media.formats import PillowFormat, format_of
from service.media.header import (
    GIF_EXTENSION,
    GIF_FRAME,
    JPEG_FRAMES,
    MAX_GIF_BLOCKS,
    MAX_JPEG_SEGMENTS,
    gif_blocks_start,
    header_size,
)
from service.media.isobmff import read_iso
from service.media.tiff import read_tiff

# Bounds on what is not pixels. Each is far above what encoders write; hostile files are far above the bound.
MAX_METADATA_BYTES = 8_000_000  # profiles, EXIF, XMP (phones put depth maps into it), texts, unknown chunks
MAX_COMMENT_BYTES = 1_000_000  # of a JPEG
MAX_FILL_BYTES = 4096  # of a JPEG: padding before its first scan
MAX_SCANS = 32  # a progressive JPEG has about 10; mozjpeg's longest script has 13
MAX_SCANNED_PIXELS = 800_000_000  # scans times pixels: 16 scans of the 50 megapixels that are allowed
MAX_PNG_CHUNKS = 16_384  # 20 MB in chunks of 8 KiB, as libpng writes them, are 2,442
MAX_WEBP_CHUNKS = 16_384
MAX_EXIF_TAGS = 512  # of the first directory; cameras write about 20
MAX_INFLATION = 1040  # deflate makes at most 1,032 bytes of one

ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # orientations whose width is the file's height
GIF_CONTROL = b"\xf9\x04"  # the label and the length of the block that says what is transparent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_FRAMES = (b"fcTL", b"fdAT")  # of an animation, after the picture
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA_FLAGS = 0x2C  # of VP8X: a profile, EXIF, XMP
# In the entropy-coded data after a scan's header, 0xFF is followed by 0 or by D0 to D7 unless it begins a marker.
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
JPEG_SCANNED = re.compile(rb"\xff(?:[\x01-\xcf\xd8-\xfe]|\xff{16})")  # a marker, or fill bytes that no encoder writes
JPEG_BARE = (0x01, *range(0x02, 0xC0), 0xD8)  # markers without a length
JPEG_END, JPEG_SCAN, JPEG_EXIF, JPEG_COMMENT, JPEG_FILL = 0xD9, 0xDA, 0xE1, 0xFE, 0xFF
JPEG_METADATA = range(0xE0, 0xF0)
JPEG_COLOURS = {0xE0: b"JFIF", 0xEE: b"Adobe"}  # the only metadata that says how to decode


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


def upright_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as EXIF turns the picture; None and errors are those of `structure_of`."""
    found = structure_of(data)
    if found is None:
        return None
    return (found.height, found.width) if found.orientation in SIDEWAYS else (found.width, found.height)


def structure_of(data: bytes) -> Structure | None:
    """Find what the file's pixels need; None if it begins like no format that is decoded.

    Raises InvalidImage if the file has more parts than an encoder writes, if it is of a kind that is not read, or if
    its size cannot be read.
    """
    kind = format_of(data)
    return None if kind is None else WALKS[kind.pillow](data)


def exif_orientation(exif: bytes) -> int:
    """EXIF's 1 to 8; 1 if there is none or it cannot be read, as in browsers. Reads the first directory only."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (directory,) = unpack(f"{order}I", tiff, 4)
    (tags,) = unpack(f"{order}H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * min(tags, MAX_EXIF_TAGS), 12):
        tag, kind = unpack(f"{order}HH", tiff, entry)
        if tag == ORIENTATION:
            layout = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
            (value,) = unpack(order + layout, tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1


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
    offset, metadata, compressed, exif, raw = len(PNG_SIGNATURE), 0, 0, b"", 0
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
        elif name == b"eXIf":
            exif = exif or data[offset + 8 : end - 4]
        if name == b"IEND" or end >= len(data):
            break
        offset = end
    else:
        raise _too_much("PNG", f"more than {MAX_PNG_CHUNKS:,} chunks")
    is_short = raw > MAX_INFLATION * (compressed + 64)
    return _sized(Structure("PNG", width, height, b"".join(kept), exif_orientation(exif), is_short=is_short))


@dataclass(slots=True)
class _JpegParts:
    """What was found in a JPEG so far."""

    width: int = 0
    height: int = 0
    scans: int = 0
    fill: int = 0  # bytes between segments before the first scan
    comments: int = 0  # bytes
    metadata: int = 0  # bytes
    orientation: int = 0  # 0: not told

    def add(self, marker: int, segment: bytes) -> None:
        """Raises InvalidImage if there is too much of it."""
        if marker == JPEG_SCAN:
            self.scans += 1
        elif marker | 0xFF00 in JPEG_FRAMES:
            if self.width:
                raise _too_much("JPEG", "two frame headers")
            self.height, self.width = unpack(">HH", segment, 5)
        elif marker == JPEG_COMMENT:
            self.comments += len(segment)
        elif marker in JPEG_METADATA:
            self.metadata += len(segment)
            if marker == JPEG_EXIF and not self.orientation and segment[4:10] == b"Exif\0\0":
                self.orientation = exif_orientation(segment[4:])
        if self.scans > MAX_SCANS:
            raise _too_much("JPEG", f"more than {MAX_SCANS} scans")
        if self.scans * self.width * self.height > MAX_SCANNED_PIXELS:
            raise _too_much("JPEG", f"{self.width}x{self.height} pixels in more than {self.scans - 1} scans")
        if self.fill > MAX_FILL_BYTES:
            raise _too_much("JPEG", f"more than {MAX_FILL_BYTES:,} fill bytes before its first scan")
        if self.comments > MAX_COMMENT_BYTES:
            raise _too_much("JPEG", f"more than {MAX_COMMENT_BYTES:,} bytes of comments")
        if self.metadata > MAX_METADATA_BYTES:
            raise _too_much("JPEG", f"more than {MAX_METADATA_BYTES:,} bytes of metadata")


def _jpeg(data: bytes) -> Structure:
    """Scans are counted to the end of the image; what follows it (a phone's video, a second picture) is dropped."""
    view, parts = memoryview(data), _JpegParts()
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    offset, first_scan, last = 2, 0, len(data)
    for _ in range(MAX_JPEG_SEGMENTS):
        until = len(data) if first_scan else min(len(data), offset + MAX_FILL_BYTES + 2)
        marked = (JPEG_SCANNED if first_scan else JPEG_MARKER).search(data, offset, until)
        if marked is None and until < len(data):
            raise _too_much("JPEG", f"more than {MAX_FILL_BYTES:,} fill bytes before its first scan")
        if marked is None:
            break
        start, marker = marked.start(), data[marked.start() + 1]
        parts.fill += 0 if first_scan else start - offset
        offset = start + 2
        if marker == JPEG_FILL:
            raise _too_much("JPEG", "more than 16 fill bytes inside a scan")
        if marker == JPEG_END:
            last = offset
            break
        if marker in JPEG_BARE:
            continue
        (length,) = unpack(">H", data, offset)
        offset += length
        segment = data[start:offset]
        parts.add(marker, segment)
        if marker == JPEG_SCAN:
            first_scan = first_scan or start
        if not first_scan and _says_how_to_decode(marker, segment[4:9]):
            kept.append(segment)
    else:
        raise _too_much("JPEG", f"more than {MAX_JPEG_SEGMENTS:,} segments")
    kept.append(view[first_scan:last])
    width = parts.width if first_scan else 0
    return _sized(Structure("JPEG", width, parts.height, b"".join(kept), parts.orientation or 1, parts.scans))


def _says_how_to_decode(marker: int, name: bytes) -> bool:
    if marker in JPEG_METADATA:
        return name.startswith(JPEG_COLOURS.get(marker, b"-"))
    return marker != JPEG_COMMENT


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
    if found.format == "AVIF":
        return _sized(Structure("AVIF", found.width, found.height, found.data, found.orientation))
    width, height = (found.height, found.width) if found.orientation > 4 else (found.width, found.height)
    return _sized(Structure("HEIF", width, height, found.data))


def _tiff(data: bytes) -> Structure:
    found = read_tiff(data)
    return _sized(Structure("TIFF", found.width, found.height, found.data, found.orientation, is_short=found.is_short))


def _bmp(data: bytes) -> Structure:
    found = read_bmp(data)
    return _sized(Structure("BMP", found.width, found.height, found.data, is_short=found.is_short))


def _webp(data: bytes) -> Structure:
    """The first frame. The file's end is where its header says."""
    view, exif, metadata, frames = memoryview(data), b"", 0, 0
    kept: list[bytes | memoryview] = []
    (length,) = unpack("<I", data, 4)
    offset, last = 12, 8 + length
    width, height = header_size(data) or (0, 0)
    if last > len(data):
        return _sized(Structure("WEBP", width, height, b"", is_short=True))
    for _ in range(MAX_WEBP_CHUNKS):
        if offset + 8 > last:
            break
        name, (length,) = data[offset : offset + 4], unpack("<I", data, offset + 4)
        end = offset + 8 + length + length % 2
        frames += name == b"ANMF"
        if name == b"VP8X":
            flags = data[offset + 8 : offset + 9]
            kept.append(data[offset : offset + 8] + bytes(each & ~WEBP_METADATA_FLAGS for each in flags))
            kept.append(view[offset + 9 : min(end, last)])
        elif name in WEBP_PIXELS:
            if name != b"ANMF" or frames == 1:
                kept.append(view[offset : min(end, last)])
        else:
            metadata += length
            if name == b"EXIF":
                exif = exif or data[offset + 8 : offset + 8 + length]
        if metadata > MAX_METADATA_BYTES:
            raise _too_much("WebP", f"more than {MAX_METADATA_BYTES:,} bytes beside its pixels")
        offset = end
    else:
        raise _too_much("WebP", f"more than {MAX_WEBP_CHUNKS:,} chunks")
    body = b"".join(kept)
    whole = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    return _sized(Structure("WEBP", width, height, whole, exif_orientation(exif)))


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
