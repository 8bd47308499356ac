"""Decode the pictures of a GIF or a WebP.

A bounded walk finds the pictures and their times, and drops all else, so that Pillow sees no metadata. Each picture is
drawn over those before it, from the first on, so a picture is the same whichever others are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from PIL import Image as Pillow

from service.core.errors import InvalidImage
from service.core.vision import IMAGE_SIZE, UInt8Array
from service.media.colours import in_colour
from service.media.decoder import squashed
from service.media.fields import unpack
from service.media.gif import GifFrame, drawn
from service.media.header import (
    GIF_EXTENSION,
    GIF_FRAME,
    MAX_WEBP_CHUNKS,
    gif_blocks_start,
    header_size,
    orientation_of,
)
from service.media.structure import kept_webp_flags

MAX_BLOCKS = 262_144  # of the whole file; 20 MB in blocks of 255 bytes are 78,000
GIF_CONTROL = b"\xf9\x04"
GIF_END = 0x3B
SHORT_MS, SHOWN_MS = 10, 100  # browsers show a picture for 100 ms whose file says 10 or less


@dataclass(frozen=True, slots=True)
class Animation:
    """An animated file without all that its pictures do not need."""

    width: int  # of the canvas, as stored
    height: int
    shown_ms: tuple[int, ...]  # how long each picture is shown
    walked_pixels: int  # of all pictures: what decoding the whole file costs
    frames: tuple[GifFrame, ...] = ()  # of a GIF
    webp: bytes = b""
    orientation: int = 1  # EXIF's 1 to 8


def read_animation(data: bytes, kind: Literal["GIF", "WEBP"]) -> Animation:
    """Raises InvalidImage if the file has more parts than an encoder writes, or is cut short."""
    return _gif(data) if kind == "GIF" else _webp(data)


def pictures(animation: Animation, wanted: Sequence[int]) -> Iterator[UInt8Array]:
    """Decode the pictures of these numbers, which ascend, to [3, 224, 224] RGB. Pillow may raise anything."""
    if animation.frames:
        shown = enumerate(drawn(animation.frames, animation.width, animation.height))
        yield from (squashed(canvas, IMAGE_SIZE) for index, canvas in shown if index in wanted)
        return
    with Pillow.open(BytesIO(animation.webp), formats=("WEBP",)) as film:
        for index in wanted:
            film.seek(index)
            yield squashed(in_colour(film), IMAGE_SIZE, animation.orientation)


def _gif(data: bytes) -> Animation:
    """Keep the header, and each picture with the control block before it.

    The canvas holds the screen and the first picture, as in `header_size`. Later pictures are cut off at its sides.
    """
    view, offset = memoryview(data), gif_blocks_start(data)
    head = data[:offset]
    width, height = unpack("<HH", data, 6)
    frames: list[GifFrame] = []
    shown_ms: list[int] = []
    walked, control, blocks = 0, b"", 0
    while offset < len(data) and data[offset] != GIF_END:
        start, begun = offset, data[offset]
        if begun == GIF_EXTENSION:
            if data[offset + 1 : offset + 3] == GIF_CONTROL:
                control = data[offset : offset + 7] + b"\0"
            offset += 2
        elif begun == GIF_FRAME:
            left, top, across, down, flags = unpack("<HHHHB", data, offset + 1)
            if not frames:
                width, height = max(width, left + across), max(height, top + down)
            elif across * down > width * height:
                raise _damaged("GIF", data)
            offset += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        else:
            raise _damaged("GIF", data)
        offset, count = _behind_blocks(data, offset, MAX_BLOCKS - blocks)
        blocks += count
        if offset > len(data):
            raise _damaged("GIF", data)
        if begun == GIF_FRAME:
            frames.append(GifFrame(head, control, view[start:offset]))
            (delay,) = struct.unpack_from("<H", control, 4) if control else (0,)
            shown_ms.append(_shown(10 * delay))
            walked += across * down
            control = b""
    if not shown_ms or not width * height:
        raise _damaged("GIF", data)
    walked = max(walked, len(shown_ms) * width * height)  # each picture is drawn on the whole canvas
    return Animation(width, height, tuple(shown_ms), walked, tuple(frames))


def _behind_blocks(data: bytes, offset: int, most: int) -> tuple[int, int]:
    """Skip blocks of data, each behind its length; 0 ends them -> where they end, and their number.

    Raises InvalidImage for more than `most`.
    """
    for count in range(1, most + 1):
        (length,) = unpack("<B", data, offset)
        offset += 1 + length
        if length == 0:
            return offset, count
    raise _too_much("GIF", f"more than {MAX_BLOCKS:,} blocks")


def _webp(data: bytes) -> Animation:
    view, last = memoryview(data), 8 + unpack("<I", data, 4)[0]
    width, height = header_size(data) or (0, 0)
    if last > len(data) or not width * height:
        raise _damaged("WebP", data)
    kept: list[bytes | memoryview] = []
    shown_ms: list[int] = []
    offset, chunks = 12, 0
    while offset + 8 <= last:
        name, (length,) = data[offset : offset + 4], unpack("<I", data, offset + 4)
        end = offset + 8 + length + length % 2
        chunks += 1
        if chunks > MAX_WEBP_CHUNKS:
            raise _too_much("WebP", f"more than {MAX_WEBP_CHUNKS:,} chunks")
        if name == b"VP8X":
            (flags,) = unpack("<B", data, offset + 8)
            kept.append(data[offset : offset + 8] + bytes([kept_webp_flags(flags)]))
            kept.append(view[offset + 9 : min(end, last)])
        elif name in (b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            kept.append(view[offset : min(end, last)])
        if name == b"ANMF":
            low, high = unpack("<HB", data, offset + 8 + 12)
            shown_ms.append(_shown(low | high << 16))
        offset = end
    body = b"".join(kept)
    whole = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    shown = tuple(shown_ms) or (SHOWN_MS,)  # without ANMF it is one still picture
    walked = len(shown) * width * height
    return Animation(width, height, shown, walked, webp=whole, orientation=orientation_of(data))


def _shown(told_ms: int) -> int:
    return told_ms if told_ms > SHORT_MS else SHOWN_MS


def _damaged(kind: str, data: bytes) -> InvalidImage:
    return InvalidImage(
        f"the {kind} is damaged or cut short ({len(data):,} bytes arrived): send the whole file", param="video"
    )


def _too_much(kind: str, what: str) -> InvalidImage:
    return InvalidImage(f"the {kind} has {what}: save it anew with an editor", param="video")
