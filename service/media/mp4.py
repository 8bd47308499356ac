"""Read from an MP4's or a MOV's boxes what its video is. Nothing is decoded, and the steps are bounded."""

from __future__ import annotations

from service.media.fields import unpack
from service.media.isobmff import boxes
from service.media.video_header import VideoHeader

MAX_BOXES = 4096  # a file in fragments of 1 s has two each
HOLDERS = (b"moov", b"trak", b"minf", b"stbl")
ENTRIES = b"stsd"
MAX_IN_MEDIA = 16  # boxes of a track's media; encoders write three or four
NEEDED = (b"ftyp", b"moov", b"moof", b"mdat")


def read_mp4(data: bytes) -> VideoHeader:
    """The largest picture of the tracks; zeros if they do not say."""
    found = VideoHeader()
    waiting, steps, seen = [(0, len(data))], 0, 0
    while waiting:
        first, last = waiting.pop()
        for kind, start, end in boxes(data, first, last):
            steps += 1
            if steps > MAX_BOXES:
                return found
            if first == 0:
                seen = end
            found.tracks += kind == b"trak"
            if kind in HOLDERS or (kind == b"mdia" and _is_video(data, start, end)):
                waiting.append((start, end))
            elif kind == ENTRIES:
                _read_entries(data, found, start + 8, end)
            elif kind == b"cmov":
                found.is_packed = True
        if first == 0:
            found.is_short = _is_cut(data, seen)
    return found


def _is_video(data: bytes, start: int, end: int) -> bool:
    """A track of sound has other fields where one of pictures has its size."""
    for _, (kind, at, _) in zip(range(MAX_IN_MEDIA), boxes(data, start, end), strict=False):
        if kind == b"hdlr":
            return data[at + 8 : at + 12] == b"vide"
    return False


def _read_entries(data: bytes, found: VideoHeader, start: int, end: int) -> None:
    for _, (kind, at, stop) in zip(range(MAX_IN_MEDIA), boxes(data, start, end), strict=False):
        if kind in (b"encv", b"drmi"):
            found.is_encrypted = True
        if stop - at >= 78:  # a picture's entry
            width, height = unpack(">HH", data, at + 24)
            found.width, found.height = max(found.width, width), max(found.height, height)


def _is_cut(data: bytes, end: int) -> bool:
    """Whether the box at the end of those that are whole says that it is longer, and the video needs it."""
    return data[end + 4 : end + 8] in NEEDED and end + 8 <= len(data)
