"""Split an image file into the parts that its format has, so that a mutation can move, repeat or change one of them."""

from __future__ import annotations

import re
import struct
import zlib
from typing import Literal

from benchmarks.fuzz.pictures import PNG_SIGNATURE

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "other"]
# A marker after entropy-coded data; in these data 0xFF is followed by 0 or by D0 to D7.
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
JPEG_BARE = (0x01, 0xD8, 0xD9)
GIF_EXTENSION, GIF_FRAME = b"\x21", b"\x2c"


def format_of(data: bytes) -> Format:
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "other"


def parts_of(data: bytes) -> list[bytes]:
    """The first part is the signature or header. Joined, the parts are the file, whatever it holds."""
    match format_of(data):
        case "JPEG":
            return _jpeg(data)
        case "PNG":
            return _chunks(data, 8)
        case "WEBP":
            return _chunks(data, 12)
        case "GIF":
            return _gif(data)
    return [data[:16], data[16:]]


def _jpeg(data: bytes) -> list[bytes]:
    """A scan's entropy-coded data belongs to its header."""
    starts = [0]
    offset = 2
    while (found := JPEG_MARKER.search(data, offset)) is not None:
        starts.append(found.start())
        offset = found.start() + 2
        if found[0][1] not in JPEG_BARE and len(data) >= offset + 2:
            offset += struct.unpack_from(">H", data, offset)[0]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def _chunks(data: bytes, offset: int) -> list[bytes]:
    """PNG's chunks (length, name, content, checksum) or RIFF's (name, length, content, padding)."""
    is_png = format_of(data) == "PNG"
    found = [data[:offset]]
    while offset < len(data):
        if is_png:
            end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        else:
            length = int.from_bytes(data[offset + 4 : offset + 8], "little")
            end = offset + 8 + length + length % 2
        found.append(data[offset:end])
        offset = end
    return found


def _gif(data: bytes) -> list[bytes]:
    """Header with the colour table, then each block with its sub-blocks."""
    offset = _table_end(data, 10, 13)
    found = [data[:offset]]
    while offset < len(data):
        start, kind = offset, data[offset : offset + 1]
        if kind == GIF_EXTENSION:
            offset = _sub_blocks_end(data, offset + 2)
        elif kind == GIF_FRAME:
            offset = _sub_blocks_end(data, _table_end(data, offset + 9, offset + 10) + 1)
        else:
            offset += 1
        found.append(data[start:offset])
    return found


def _table_end(data: bytes, flags_at: int, start: int) -> int:
    flags = data[flags_at] if flags_at < len(data) else 0
    return start + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def _sub_blocks_end(data: bytes, offset: int) -> int:
    while offset < len(data) and data[offset]:
        offset += 1 + data[offset]
    return offset + 1


def mended(data: bytes) -> bytes:
    """Correct what a decoder checks before it reads on: a PNG's checksums, a WebP's length."""
    match format_of(data):
        case "PNG":
            first, *chunks = parts_of(data)
            return first + b"".join(_with_checksum(chunk) for chunk in chunks)
        case "WEBP":
            return data[:4] + struct.pack("<I", (len(data) - 8) & 0xFFFFFFFF) + data[8:]
    return data


def _with_checksum(chunk: bytes) -> bytes:
    if len(chunk) < 12:
        return chunk
    return chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
