"""Split an image, a clip or a document into the parts that its format has.

A mutation can then move, repeat or change one of them.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from benchmarks.fuzz.pictures import PNG_SIGNATURE

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "MP4", "EBML", "PDF", "other"]
MAGIC: Sequence[tuple[Format, int, bytes]] = (
    ("JPEG", 0, b"\xff\xd8"),
    ("PNG", 0, PNG_SIGNATURE),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("WEBP", 8, b"WEBP"),
    ("MP4", 4, b"ftyp"),
    ("EBML", 0, b"\x1a\x45\xdf\xa3"),
    ("PDF", 0, b"%PDF"),
)
# A marker after entropy-coded data; in these data 0xFF is followed by 0 or by D0 to D7.
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
JPEG_BARE = (0x01, 0xD8, 0xD9)
GIF_EXTENSION, GIF_FRAME = b"\x21", b"\x2c"
# What holds others: its head is a part, and each part in it is one.
BOXES = (b"moov", b"trak", b"edts", b"mdia", b"minf", b"dinf", b"stbl", b"mvex", b"moof", b"traf")
ELEMENTS = (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0", b"\x1f\x43\xb6\x75")
PDF_OBJECT = re.compile(rb"(?m)^(?=\d+ \d+ obj|xref|trailer|startxref)")


def format_of(data: bytes) -> Format:
    return next((name for name, at, magic in MAGIC if data.startswith(magic, at)), "other")


def parts_of(data: bytes) -> list[bytes]:
    """The first part is the signature or header. Joined, the parts are the file, whatever it holds."""
    split = SPLIT.get(format_of(data))
    return [data[:16], data[16:]] if split is None else list(split(data))


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


def _boxes(data: bytes) -> Iterator[bytes]:
    """Boxes (length, name, content), those within BOXES too."""
    offset = 0
    while offset < len(data):
        length, name = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        end = offset + 8 if name in BOXES else offset + max(8, length)
        yield data[offset:end]
        offset = end


def _elements(data: bytes) -> Iterator[bytes]:
    """Elements (name, length, content), those within ELEMENTS too."""
    offset = 0
    while offset < len(data):
        name_end = offset + _length_of_number(data[offset])
        name = data[offset:name_end]
        head = name_end + _length_of_number(data[name_end]) if name_end < len(data) else name_end
        length = int.from_bytes(data[name_end:head], "big") & ((1 << 7 * (head - name_end)) - 1)
        end = head if name in ELEMENTS else head + length
        yield data[offset:end]
        offset = end


def _length_of_number(first: int) -> int:
    """Bytes of one of EBML's numbers, by its first byte."""
    return 9 - first.bit_length() if first else 1


def _table_end(data: bytes, flags_at: int, start: int) -> int:
    flags = data[flags_at] if flags_at < len(data) else 0
    return start + (3 << (flags & 7) + 1 if flags & 0x80 else 0)


def _sub_blocks_end(data: bytes, offset: int) -> int:
    while offset < len(data) and data[offset]:
        offset += 1 + data[offset]
    return offset + 1


def _objects(data: bytes) -> list[bytes]:
    """A PDF's objects, its table of them, and where that is."""
    return [part for part in PDF_OBJECT.split(data) if part]


SPLIT: Mapping[Format, Callable[[bytes], Iterable[bytes]]] = {
    "JPEG": _jpeg,
    "PNG": partial(_chunks, offset=8),
    "WEBP": partial(_chunks, offset=12),
    "GIF": _gif,
    "MP4": _boxes,
    "EBML": _elements,
    "PDF": _objects,
}


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
