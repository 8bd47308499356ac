"""Recognise a clip by its first bytes, and read what it costs to decode. Nothing is decoded, and steps are bounded."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Literal

from service.core.errors import InvalidImage
from service.media.ebml import read_ebml
from service.media.fields import unpack
from service.media.foreign import found_in
from service.media.formats import format_of
from service.media.header import GIF_EXTENSION, GIF_FRAME, MAX_GIF_BLOCKS, gif_blocks_start, header_size
from service.media.mp4 import read_mp4
from service.media.video_header import VideoHeader

ClipFormat = Literal["GIF", "WebP", "MP4", "WebM"]
FRAME_PIXELS = 224 * 224  # of a decoded frame. Not imported: the command line reads this module without NumPy
FILMS: tuple[ClipFormat, ...] = ("MP4", "WebM")  # files that are clips and no images; a GIF or WebP is both
HAS_PYAV = find_spec("av") is not None  # the extra `video`; it is loaded by the decoding processes only
CLIP_NAMES = "MP4, MOV, WebM, or an animated GIF or WebP"
MAX_FRAME_PIXELS = 4096 * 2304  # of one picture: 4K. The largest of video's common sizes whose decoding fits the limits
STARTS: tuple[tuple[ClipFormat, re.Pattern[bytes]], ...] = (
    ("MP4", re.compile(rb"....(ftyp|moov|mdat|wide|free|skip)", re.DOTALL)),  # MOV too
    ("WebM", re.compile(rb"\x1a\x45\xdf\xa3")),  # Matroska too
)


def clip_format(data: bytes) -> ClipFormat | None:
    """Return the format that the file begins like, if decode_clip reads it. A GIF or a WebP may be a still picture."""
    image = format_of(data)
    if image is not None:
        match image.pillow:
            case "GIF":
                return "GIF"
            case "WEBP":
                return "WebP"
            case _:
                return None
    return next((kind for kind, start in STARTS if start.match(data)), None)


def is_clip(data: bytes) -> bool:
    """Whether the file has several pictures and decode_clip takes it, by its beginning only.

    False for a GIF whose second picture lies behind MAX_GIF_BLOCKS blocks, unless it says that it repeats.
    """
    match clip_format(data):
        case "GIF":
            return _is_animated_gif(data)
        case "WebP":
            return data[12:16] == b"VP8X" and bool(unpack("<B", data, 20)[0] & 2)
        case None:
            return False
    return True


def clip_cost(data: bytes, most: int, max_pixels: int) -> int:
    """Return the pixels that a decoder of at most `most` frames holds at once, by the file's headers.

    They are those of one frame, the largest that is allowed if the headers do not say, and of the frames as the model
    sees them. The decoder refuses a frame of more than `max_pixels`. The cost is at most that too, so that a server
    with room for one image has room for one clip.
    """
    told = told_of(data)
    frame = min(told.width * told.height or MAX_FRAME_PIXELS, MAX_FRAME_PIXELS)
    return min(frame + most * FRAME_PIXELS, max_pixels)


def told_of(data: bytes) -> VideoHeader:
    """What the headers of a clip of any format say; zeros if they say nothing."""
    match clip_format(data):
        case None:
            return VideoHeader()
        case "GIF" | "WebP":
            return VideoHeader(*(header_size(data) or (0, 0)))
    return video_header(data)


def require_clip(data: bytes) -> ClipFormat:
    """Return the format that the file begins like. Raises InvalidImage if decode_clip does not read it."""
    kind = clip_format(data)
    if kind is None:
        raise InvalidImage(f"{found_in(data, 'video')}; send {CLIP_NAMES}", param="video")
    if kind in FILMS and not HAS_PYAV:
        raise InvalidImage(
            "MP4, MOV and WebM are read if the operator has run .venv/bin/pip install -c constraints.txt -e '.[video]' "
            "in Glimpse's folder; send an animated GIF or WebP, or images as `frames`",
            param="video",
        )
    return kind


def video_header(data: bytes) -> VideoHeader:
    """Of a file whose clip_format is MP4 or WebM."""
    return read_ebml(data) if clip_format(data) == "WebM" else read_mp4(data)


def _is_animated_gif(data: bytes) -> bool:
    offset, frames, inside = gif_blocks_start(data), 0, False
    for _ in range(MAX_GIF_BLOCKS):
        if offset >= len(data):
            return False
        block = data[offset]
        if inside:  # this is a length, and 0 ends it
            inside = block > 0
            offset += 1 + block
        elif block == GIF_EXTENSION:
            if data[offset + 1 : offset + 14] in (b"\xff\x0bNETSCAPE2.0", b"\xff\x0bANIMEXTS1.0"):
                return True
            inside = True
            offset += 2
        elif block == GIF_FRAME:
            frames += 1
            if frames > 1:
                return True
            (flags,) = unpack("<B", data, offset + 9)
            offset += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            inside = True
        else:
            return False
    return False
