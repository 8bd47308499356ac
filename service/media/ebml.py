"""Read from a WebM's or a Matroska's elements what its video is. Nothing is decoded, and the steps are bounded."""

from __future__ import annotations

from collections.abc import Iterator

from service.media.video_header import Steps, VideoHeader

MAX_ELEMENTS = 4096  # of the whole walk
HEADER, SEGMENT, TRACKS, TRACK, VIDEO, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675
WIDTH, HEIGHT = 0xB0, 0xBA
ENCODINGS, ENCODING, ENCRYPTION = 0x6D80, 0x6240, 0x5035
HOLDERS = (TRACKS, TRACK, VIDEO, ENCODINGS, ENCODING)


def read_ebml(data: bytes) -> VideoHeader:
    """The largest picture of the tracks; zeros if they do not say."""
    found, steps = VideoHeader(), Steps(MAX_ELEMENTS)
    waiting: list[tuple[int, int]] = []
    for name, start, end, told_end in steps.of(_elements(data, 0, len(data))):
        if name == SEGMENT:
            found.is_short = told_end is not None and told_end > len(data)
            waiting.append((start, end))
            break
    while waiting:
        for name, start, end, _ in steps.of(_elements(data, *waiting.pop())):
            if name == CLUSTER:  # tracks come before what is in them
                break
            found.tracks += name == TRACK
            if name in HOLDERS:
                waiting.append((start, end))
            elif name == WIDTH:
                found.width = max(found.width, int.from_bytes(data[start : min(end, start + 8)], "big"))
            elif name == HEIGHT:
                found.height = max(found.height, int.from_bytes(data[start : min(end, start + 8)], "big"))
            elif name == ENCRYPTION:
                found.is_encrypted = True
    return found


def _elements(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int | None]]:
    """Name, start and end of the elements' contents, and the end that they tell, if any."""
    while start < end:
        name, length = _number(data, start, 4, keeps_marker=True)
        if not length:
            return
        start += length
        size, length = _number(data, start, 8, keeps_marker=False)
        start += length
        if not length or start > end:
            return
        unknown = size == (1 << 7 * length) - 1
        told_end = None if unknown else start + size
        stop = end if told_end is None else min(told_end, end)
        yield name, start, stop, told_end
        start = stop


def _number(data: bytes, start: int, most: int, *, keeps_marker: bool) -> tuple[int, int]:
    """A number of variable length, and its bytes; zeros if it is none."""
    first = data[start] if start < len(data) else 0
    length = 9 - first.bit_length()
    if not first or length > most or start + length > len(data):
        return 0, 0
    number = int.from_bytes(data[start : start + length], "big")
    return number if keeps_marker else number - (1 << 7 * length), length
