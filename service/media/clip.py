"""Decode a clip: a file with several pictures, to frames that are evenly spaced over it.

GIF and WebP are decoded by Pillow, MP4, MOV, WebM and Matroska by FFmpeg's libraries (PyAV).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from service.core.errors import GlimpseError, InvalidImage, TooLarge
from service.core.frames import MAX_FRAMES
from service.core.vision import UInt8Array
from service.media.animation import pictures, read_animation
from service.media.clip_header import (
    MAX_FRAME_PIXELS,
    ClipFormat,
    clip_cost,
    is_clip,
    require_clip,
    told_of,
)
from service.media.decoder import ImageLimits, require_bytes
from service.media.exif import SIDEWAYS
from service.media.video_header import MAX_TRACKS, VideoHeader

if TYPE_CHECKING:
    from service.media.film import Film

__all__ = ["DecodedClip", "DecodedFrame", "clip_cost", "decode_clip", "is_clip"]
MAX_FRAMES_WALKED = 3000  # decoded to get at those that are asked for: 100 s of 30 a second
BLOCK, LEAST_ROWS, GROWN_PIXELS = 64, 280, 1280 * 720  # see _most_pixels
MAX_PIXELS_WALKED = 4_000_000_000  # in all of them: 64 s of 1920x1080 at 30 a second


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """One picture of a clip. `pixels` depend on the file and the index only, whatever else is decoded."""

    index: int  # among all pictures of the file in the order of their times
    time_s: float  # from the first picture
    pixels: UInt8Array  # [3, 224, 224] RGB, upright


@dataclass(frozen=True, slots=True)
class DecodedClip:
    width: int  # upright
    height: int
    duration_s: float
    frames: tuple[DecodedFrame, ...]
    count: int  # pictures in the file
    times_s: tuple[float, ...]  # of the `choosable` ones, from the first picture


def decode_clip(data: bytes, limits: ImageLimits, most: int) -> DecodedClip:
    """Decode at most `most` frames, evenly spaced by their number, the first and the last among them.

    They are spaced by number, not by time. So each picture comes at most once, and one that is shown for long does not
    crowd out the others. Raises InvalidImage, TooLarge.
    """
    require_bytes(data, limits, "video")
    kind = require_clip(data)
    decoded = _animated if kind in ("GIF", "WebP") else partial(_filmed, _film())
    try:
        return decoded(data, kind, limits, most)
    except GlimpseError:
        raise
    except MemoryError as exc:
        raise TooLarge(
            f"decoding the {kind} takes too much memory: send it smaller, or save it anew", param="video"
        ) from exc
    except Exception as exc:  # on hostile bytes a decoder may raise anything
        raise InvalidImage(
            f"the {kind} is damaged or cut short ({len(data):,} bytes arrived): send the whole file", param="video"
        ) from exc


def spaced(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`, evenly spaced from the first to the last; if one, the first."""
    kept = min(count, most)
    return [round(place * (count - 1) / max(kept - 1, 1)) for place in range(kept)]


def choosable(count: int) -> list[int]:
    """Return all of `count` numbers that `spaced` gives for any number of frames: at most 528, in order."""
    return sorted({number for most in range(1, MAX_FRAMES + 1) for number in spaced(count, most)})


def require_frame_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raises TooLarge."""
    most = min(limits.max_pixels, MAX_FRAME_PIXELS)
    if max(width, height) > limits.max_side:
        raise TooLarge(
            f"the video has {width}x{height} pixels, the limit of a side is {limits.max_side:,}: cut it, or send it "
            "smaller",
            param="video",
        )
    if width * height > most:
        raise TooLarge(
            f"the video has {width}x{height} pixels ({width * height / 1e6:.1f} megapixels), the limit is "
            f"{most / 1e6:.1f}: send it smaller",
            param="video",
        )


def require_told(told: VideoHeader, limits: ImageLimits) -> None:
    """Refuse what is not decoded, by what the headers say. Raises InvalidImage, TooLarge."""
    if told.is_encrypted:
        raise InvalidImage("the video is encrypted: send one that is not", param="video")
    if told.is_packed:
        raise InvalidImage("the video's header is compressed, which is not read: save it anew", param="video")
    if told.tracks > MAX_TRACKS:
        raise InvalidImage(
            f"the video has {told.tracks} tracks, the limit is {MAX_TRACKS}: save it anew with its pictures only",
            param="video",
        )
    require_frame_size(told.width, told.height, limits)


def require_walk(frames: int, pixels: int) -> None:
    """Raises TooLarge."""
    if frames > MAX_FRAMES_WALKED:
        raise TooLarge(
            f"{frames:,} pictures of the video would have to be decoded, the limit is {MAX_FRAMES_WALKED:,}: cut it, "
            "or save it anew with more keyframes",
            param="video",
        )
    if pixels > MAX_PIXELS_WALKED:
        raise TooLarge(
            f"{frames:,} pictures of the video would have to be decoded, {pixels / 1e6:,.0f} megapixels; the limit is "
            f"{MAX_PIXELS_WALKED / 1e6:,.0f}: send it shorter or smaller",
            param="video",
        )


def _animated(data: bytes, kind: ClipFormat, limits: ImageLimits, most: int) -> DecodedClip:
    film = read_animation(data, "GIF" if kind == "GIF" else "WEBP")
    require_frame_size(film.width, film.height, limits)
    require_walk(len(film.shown_ms), film.walked_pixels)
    begins_ms = [0, *accumulate(film.shown_ms)]
    wanted = spaced(len(film.shown_ms), most)
    frames = tuple(
        DecodedFrame(index, begins_ms[index] / 1000, pixels)
        for index, pixels in zip(wanted, pictures(film, wanted), strict=True)
    )
    size = (film.height, film.width) if film.orientation in SIDEWAYS else (film.width, film.height)
    count = len(film.shown_ms)
    times_s = tuple(begins_ms[index] / 1000 for index in choosable(count))
    return DecodedClip(*size, begins_ms[-1] / 1000, frames, count, times_s)


def _film() -> type[Film]:
    """Load FFmpeg, which the gateway's own process never needs. Raises ImportError without PyAV."""
    from service.media.film import Film  # noqa: PLC0415

    return Film


def _most_pixels(told: VideoHeader, limits: ImageLimits) -> int:
    """Return how many pixels a frame may have: those that the header tells, for which there is room.

    A codec decodes whole blocks, of up to 64 pixels a side. FFmpeg's MPEG-4 needs rows of up to two blocks more, and
    280 of them. The pictures of a recorded call begin small and may grow.
    """
    most = min(limits.max_pixels, MAX_FRAME_PIXELS)
    if not told.width * told.height:
        return most
    across, down = (-(-side // BLOCK) for side in (told.width, max(told.height, LEAST_ROWS)))
    return min(most, max((across + 2) * down * BLOCK**2, GROWN_PIXELS))


def _filmed(read: type[Film], data: bytes, kind: ClipFormat, limits: ImageLimits, most: int) -> DecodedClip:
    told = told_of(data)
    require_told(told, limits)
    if told.is_short:
        raise ValueError("bytes are missing")
    with closing(read(data, "matroska" if kind == "WebM" else "mov", _most_pixels(told, limits))) as film:
        width, height = film.size
        require_frame_size(width, height, limits)
        wanted = spaced(film.count, most)
        runs = film.runs(wanted)
        walked = sum(run.end - run.start for run in runs)
        require_walk(walked, walked * width * height)
        times_s, duration_s = film.times_s()
        pixels = dict(frame for run in runs for frame in film.frames(run))
        frames = tuple(DecodedFrame(index, times_s[index], pixels[index]) for index in wanted)
        size = (height, width) if film.orientation in SIDEWAYS else (width, height)
    return DecodedClip(*size, duration_s, frames, film.count, tuple(times_s[index] for index in choosable(film.count)))
