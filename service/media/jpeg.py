"""Walk a JPEG's segments.

Up to its first scan a walk is bounded whatever the bytes are, so size and orientation are read on the event loop. From
there on, bytes are searched for markers: only a decoding worker walks so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from service.core.errors import InvalidImage
from service.media.exif import exif_orientation
from service.media.fields import unpack

# Bounds on what is not pixels. Each is far above what encoders write; hostile files are far above the bound.
MAX_SEGMENTS = 1024  # cameras write about ten; a profile or XMP of 8 MB takes 123
MAX_METADATA_BYTES = 8_000_000  # profiles, EXIF, XMP (phones put depth maps into it)
MAX_COMMENT_BYTES = 1_000_000
MAX_FILL_BYTES = 4096  # padding before the first scan
MAX_SCANS = 32  # a progressive JPEG has about 10; mozjpeg's longest script has 13
MAX_SCANNED_PIXELS = 800_000_000  # scans times pixels: 16 scans of the 50 megapixels that are allowed

# In the entropy-coded data after a scan's header, 0xFF is followed by 0 or by D0 to D7 unless it begins a marker.
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
SCANNED = re.compile(rb"\xff(?:[\x01-\xcf\xd8-\xfe]|\xff{16})")  # a marker, or fill bytes that no encoder writes
BARE = frozenset((0x01, *range(0x02, 0xC0), 0xD8))  # markers without a length
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
END, SCAN, EXIF, COMMENT, FILL = 0xD9, 0xDA, 0xE1, 0xFE, 0xFF
METADATA = range(0xE0, 0xF0)
COLOURS = {0xE0: b"JFIF", 0xEE: b"Adobe"}  # the only metadata that says how to decode


@dataclass(frozen=True, slots=True)
class Jpeg:
    width: int  # zeros if they cannot be read
    height: int
    data: bytes  # to the end of the image, without metadata
    scans: int


@dataclass(slots=True)
class _Parts:
    """What was found so far."""

    width: int = 0
    height: int = 0
    frames: int = 0
    scans: int = 0
    comments: int = 0  # bytes
    metadata: int = 0  # bytes

    def add(self, marker: int, segment: memoryview) -> None:
        """Raises InvalidImage if there is too much of it."""
        if marker == SCAN:
            self.scans += 1
        elif marker in FRAMES:
            self.frames += 1
            if self.frames > 1 or self.scans:
                raise _too_much("two frame headers, or one behind its first scan")
            self.width, self.height = _size(segment)
        elif marker == COMMENT:
            self.comments += len(segment)
        elif marker in METADATA:
            self.metadata += len(segment)
        if self.scans > MAX_SCANS:
            raise _too_much(f"more than {MAX_SCANS} scans")
        if self.scans * self.width * self.height > MAX_SCANNED_PIXELS:
            raise _too_much(f"{self.width}x{self.height} pixels in more than {self.scans - 1} scans")
        if self.comments > MAX_COMMENT_BYTES:
            raise _too_much(f"more than {MAX_COMMENT_BYTES:,} bytes of comments")
        if self.metadata > MAX_METADATA_BYTES:
            raise _too_much(f"more than {MAX_METADATA_BYTES:,} bytes of metadata")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height as stored; zeros if they cannot be read. Raises InvalidImage."""
    for marker, start, end in _segments(data):
        if marker in FRAMES:
            return _size(memoryview(data)[start:end])
        if marker == SCAN:
            break
    return 0, 0


def jpeg_orientation(data: bytes) -> int:
    """EXIF's 1 to 8. EXIF behind the first scan's header says nothing. Raises InvalidImage."""
    for marker, start, end in _segments(data):
        if marker == EXIF and data[start + 4 : start + 10] == b"Exif\0\0":
            return exif_orientation(memoryview(data)[start + 4 : end])
        if marker == SCAN:
            break
    return 1


def read_jpeg(data: bytes) -> Jpeg:
    """Scans are counted to the end of the image; what follows it (a phone's video, a second picture) is dropped.

    Raises InvalidImage for more parts than an encoder writes.
    """
    view, parts = memoryview(data), _Parts()
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    first_scan, last = 0, len(data)
    for marker, start, end in _segments(data):
        if marker == END:
            last = end
            break
        parts.add(marker, view[start:end])
        if marker == SCAN:
            first_scan = first_scan or start
        if not first_scan and _says_how_to_decode(marker, data[start + 4 : start + 9]):
            kept.append(view[start:end])
    kept.append(view[first_scan:last])
    return Jpeg(parts.width if first_scan else 0, parts.height, b"".join(kept), parts.scans)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker, start and end, to the end of the image. What lies between them is passed over.

    Raises InvalidImage.
    """
    offset, fill, is_scanned = 2, 0, False
    for _ in range(MAX_SEGMENTS):
        until = len(data) if is_scanned else min(len(data), offset + MAX_FILL_BYTES + 2)
        marked = (SCANNED if is_scanned else MARKER).search(data, offset, until)
        if marked is None and until == len(data):
            return
        fill += 0 if is_scanned or marked is None else marked.start() - offset
        if marked is None or fill > MAX_FILL_BYTES:
            raise _too_much(f"more than {MAX_FILL_BYTES:,} fill bytes before its first scan")
        start, marker = marked.start(), data[marked.start() + 1]
        offset = start + 2
        if marker == FILL:
            raise _too_much("more than 16 fill bytes inside a scan")
        if marker in BARE:
            continue
        if marker == END:
            yield marker, start, offset
            return
        (length,) = unpack(">H", data, offset)
        offset += length
        yield marker, start, offset
        is_scanned = is_scanned or marker == SCAN
    raise _too_much(f"more than {MAX_SEGMENTS:,} segments")


def _size(frame: memoryview) -> tuple[int, int]:
    """Width and height of a frame header; zeros if it is too short."""
    height, width = unpack(">HH", frame, 5)
    return width, height


def _says_how_to_decode(marker: int, name: bytes) -> bool:
    if marker in METADATA:
        return name.startswith(COLOURS.get(marker, b"-"))
    return marker != COMMENT


def _too_much(what: str) -> InvalidImage:
    return InvalidImage(f"the JPEG has {what}: save it anew with an image editor", param="image")
