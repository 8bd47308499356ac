"""Read from an MP4's or a MOV's boxes what its video is. Nothing is decoded, and the steps are bounded."""

from __future__ import annotations

from itertools import islice

from service.media.fields import unpack
from service.media.isobmff import boxes
from service.media.video_header import Steps, VideoHeader

MAX_BOXES = 4096  # of the whole walk; each fragment of a file is two
HOLDERS = (b"moov", b"trak", b"minf", b"stbl")
ENTRIES = b"stsd"
MAX_IN_MEDIA = 16  # boxes of a track's media; encoders write three or four
NEEDED = (b"ftyp", b"moov", b"moof", b"mdat")


def read_mp4(data: bytes) -> VideoHeader:
    """The largest picture of the tracks; zeros if they do not say.

    `moov` is read as soon as it is found, so it is read of a file of any number of fragments.
    """
    found, steps, seen = VideoHeader(), Steps(MAX_BOXES), 0
    for kind, start, end in steps.of(boxes(data, 0, len(data))):
        seen = end
        _read_box(data, found, steps, kind, start, end)
    found.is_short = not steps.is_spent and _is_cut(data, seen)
    return found


def _read_box(data: bytes, found: VideoHeader, steps: Steps, kind: bytes, start: int, end: int) -> None:
    """Read a box and all that it holds."""
    waiting = [(kind, start, end)]
    while waiting:
        kind, start, end = waiting.pop()
        found.tracks += kind == b"trak"
        if kind in HOLDERS or (kind == b"mdia" and _is_video(data, steps, start, end)):
            waiting += steps.of(boxes(data, start, end))
        elif kind == ENTRIES:
            _read_entries(data, found, steps, start + 8, end)
        elif kind == b"cmov":
            found.is_packed = True


def _is_video(data: bytes, steps: Steps, start: int, end: int) -> bool:
    """A track of sound has other fields where one of pictures has its size."""
    for kind, at, _ in islice(steps.of(boxes(data, start, end)), MAX_IN_MEDIA):
        if kind == b"hdlr":
            return data[at + 8 : at + 12] == b"vide"
    return False


def _read_entries(data: bytes, found: VideoHeader, steps: Steps, start: int, end: int) -> None:
    for kind, at, stop in islice(steps.of(boxes(data, start, end)), MAX_IN_MEDIA):
        if kind in (b"encv", b"drmi"):
            found.is_encrypted = True
        if stop - at >= 78:  # a picture's entry
            width, height = unpack(">HH", data, at + 24)
            found.width, found.height = max(found.width, width), max(found.height, height)


def _is_cut(data: bytes, end: int) -> bool:
    """Whether the box at the end of those that are whole says that it is longer, and the video needs it."""
    return data[end + 4 : end + 8] in NEEDED and end + 8 <= len(data)
