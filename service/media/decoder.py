"""Bytes to pixels, and the images that were sent once to be asked about often.

Bytes come from anyone: the header is checked before a pixel is decoded, and decoding happens off the event loop.
"""

from __future__ import annotations

import asyncio
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Self

import numpy as np
from blake3 import blake3
from PIL import GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL import Image as Pillow

from service.core.errors import InvalidImage, NotFound, TooLarge
from service.core.vision import CLOSER_SIZE, CROPS, IMAGE_SIZE, UInt8Array
from service.settings import IMAGE_ENTRY_BYTES

# Imported here, as Pillow imports its readers late and then all fifty: the first request would wait 30 ms for them.
READERS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
)
FORMATS = tuple(reader.format for reader in READERS)
INLINE_HASH_BYTES = 1_000_000  # below this, hashing (about 0.25 ms a megabyte) is cheaper than a thread
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # EXIF orientation -> what brings the picture upright
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations whose width is the file's height

MAX_JPEG_SEGMENTS = 512  # cameras write some ten
MAX_GIF_BLOCKS = 512  # before the first frame; encoders write one or two
GIF_EXTENSION, GIF_FRAME = 0x21, 0x2C
JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2, 0xFFC3, 0xFFC5, 0xFFC6, 0xFFC7, 0xFFC9, 0xFFCA, 0xFFCB, 0xFFCD, 0xFFCE, 0xFFCF)

FOREIGN = (  # offset, lower-case magic, name: what people send most that is not an image we read
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG"),
    (0, b"<!doctype", "an HTML page"),
    (0, b"<html", "an HTML page"),
    (0, b"%pdf", "PDF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
    (0, b"ii*\0", "TIFF"),
    (0, b"mm\0*", "TIFF"),
    (0, b"bm", "BMP"),
)

# Pillow's own guard warns at 89 and raises at 179 megapixels. Ours stands in front of it and is lower.
Pillow.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may measure, before anything is decoded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it was sent."""

    data: bytes
    digest: str  # blake3 of `data`, 64 hexadecimal digits

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(data, blake3(data).hexdigest())

    @property
    def id(self) -> str:
        return f"img_{self.digest[:32]}"

    def larger_than(self, size: int) -> bool:
        """Whether a side has more pixels, or may have: not every file tells."""
        told = header_size(self.data)
        return told is None or max(told) > size


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as the vision encoder sees it."""

    views: Mapping[int, UInt8Array]  # by their size in pixels: [3, size, size] RGB
    width: int  # of the whole picture, upright
    height: int

    @property
    def pixels(self) -> UInt8Array:
        """[3, 224, 224] RGB: the whole picture."""
        return self.views[IMAGE_SIZE]

    @property
    def crops(self) -> UInt8Array:
        """[4, 3, 224, 224] RGB: the closer view's top left, top right, bottom left and bottom right."""
        rows = self.views[CLOSER_SIZE].reshape(3, 2, IMAGE_SIZE, 2, IMAGE_SIZE)
        return np.ascontiguousarray(rows.transpose(1, 3, 0, 2, 4)).reshape(CROPS, 3, IMAGE_SIZE, IMAGE_SIZE)


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the file's first bytes tell them, in microseconds; zeros where they are no image we read,
    None where they may be one but do not tell its size. EXIF may still turn the picture.

    Decoders are not asked: on hostile bytes they take their time even for that. `decode` refuses a picture that turns
    out to be larger.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _unpack(">II", data, 16) if data[12:16] == b"IHDR" else (0, 0)
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        size = _gif_size(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp_size(data)
    else:
        return 0, 0
    return (size[0], size[1]) if size[0] * size[1] else None


def header_pixels(data: bytes) -> int | None:
    """Width times height, as `header_size` tells them."""
    size = header_size(data)
    return None if size is None else size[0] * size[1]


def _unpack(layout: str, data: bytes, offset: int) -> tuple[int, ...]:
    """Zeros where the bytes end before."""
    if len(data) < offset + struct.calcsize(layout):
        return (0,) * len(layout[1:])
    return struct.unpack_from(layout, data, offset)


def _jpeg_size(data: bytes) -> tuple[int, ...]:
    """From the frame header, which stands behind at most MAX_JPEG_SEGMENTS others."""
    offset = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        marker, length = _unpack(">HH", data, offset)
        if marker in JPEG_FRAMES:
            return _unpack(">HH", data, offset + 5)
        if marker == 0xFFFF:  # fill bytes
            offset += 1
        elif marker < 0xFF01 or length < 2:
            break
        else:
            offset += 2 + length
    return 0, 0


def _gif_size(data: bytes) -> tuple[int, ...]:
    """Of what holds both the screen and the first frame, which may be larger than the screen."""
    width, height, flags = _unpack("<HHB", data, 6)
    offset = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # behind the colours
    in_extension = False
    for _ in range(MAX_GIF_BLOCKS):
        (block,) = _unpack("<B", data, offset)
        if in_extension:  # this is a length, and 0 ends it
            in_extension = block > 0
            offset += 1 + block
        elif block == GIF_EXTENSION:
            in_extension = True
            offset += 2
        elif block == GIF_FRAME:
            left, top, frame_width, frame_height = _unpack("<HHHH", data, offset + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            break
    return 0, 0


def _webp_size(data: bytes) -> tuple[int, ...]:
    match data[12:16]:
        case b"VP8 ":
            width, height = _unpack("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            bits, _ = _unpack("<IB", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            low, high, low_height, high_height = _unpack("<HBHB", data, 24)
            return (low | high << 16) + 1, (low_height | high_height << 16) + 1
    return 0, 0


def decode(data: bytes, limits: ImageLimits, views: Sequence[int] = (IMAGE_SIZE,)) -> Decoded:
    """Any PNG, JPEG, WebP or GIF (first frame) -> for each view's size uint8 [3, size, size] RGB.

    The whole picture is squashed to a square with Pillow's bicubic filter, as BLIP-2's BlipImageProcessor does; one
    of that size passes through untouched. Transparency lies on white, 16-bit samples keep their upper 8 bits, CMYK is
    converted without a colour profile, EXIF orientation is applied. A view is the same whatever other views are asked
    for. Raises InvalidImage, TooLarge.
    """
    if not data:
        raise InvalidImage(
            "the image is empty (0 bytes): check that the file was read before it was sent", param="image"
        )
    if len(data) > limits.max_bytes:
        raise TooLarge(
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}: send it smaller "
            f"(the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
            param="image",
        )
    # What a decoder raises on hostile bytes is anything (OSError, SyntaxError, struct.error, ValueError, MemoryError):
    # all of it says that these bytes are no image.
    try:
        picture = Pillow.open(BytesIO(data), formats=FORMATS)
    except Exception as exc:
        raise InvalidImage(
            f"not an image that can be read: {_looks_like(data)}; send PNG, JPEG, WebP or GIF", param="image"
        ) from exc
    with picture:
        width, height = picture.size
        if width * height > limits.max_pixels:
            raise TooLarge(
                f"the image has {width}x{height} pixels ({width * height / 1e6:.1f} megapixels), the limit is "
                f"{limits.max_pixels / 1e6:.1f}: send it smaller (the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
                param="image",
            )
        told = header_pixels(data)
        if told is not None and width * height > told:
            raise InvalidImage(
                f"the {picture.format} tells two sizes, {told:,} pixels first and then {width}x{height}: save it anew",
                param="image",
            )
        try:
            orientation = _orientation(picture)
            pixels = _views(picture, data, orientation, views)
        except Exception as exc:
            raise InvalidImage(
                f"the {picture.format} is damaged or cut short ({len(data):,} bytes arrived): send the whole file",
                param="image",
            ) from exc
    return Decoded(pixels, *((height, width) if orientation in SIDEWAYS else (width, height)))


def _views(picture: Pillow.Image, data: bytes, orientation: int, views: Sequence[int]) -> dict[int, UInt8Array]:
    """Decodes once, but for a JPEG so large that the views want it at different scales."""
    whole, colours, found = picture.size, None, {}
    for size in sorted(views):
        if colours is None or colours.size != whole:
            source = picture if colours is None else Pillow.open(BytesIO(data), formats=FORMATS)
            # A JPEG decodes at 1/2, 1/4 or 1/8 for less: never under twice what we need, or the difference shows.
            source.draft(None, (2 * size, 2 * size))
            colours = _in_colour(source)
        found[size] = _squashed(colours, size, orientation)
    return found


def _squashed(colours: Pillow.Image, size: int, orientation: int) -> UInt8Array:
    """[3, size, size] RGB, upright."""
    side = (size, size)
    if colours.size != side:
        colours = colours.resize(side, Pillow.Resampling.BICUBIC)
    if colours.mode == "RGBA":  # after the resize: Pillow weighs colours by alpha, and this is the small one
        white = Pillow.new("RGBA", side, (255, 255, 255, 255))
        colours = Pillow.alpha_composite(white, colours).convert("RGB")
    if orientation in TURNS:  # a turn commutes with a squash to a square
        colours = colours.transpose(TURNS[orientation])
    return np.ascontiguousarray(np.asarray(colours).transpose(2, 0, 1))


def _in_colour(picture: Pillow.Image) -> Pillow.Image:
    """RGB, or RGBA where something is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey: I;16, I;16B, or I with 16-bit values
        grey = np.asarray(picture).clip(0, 65535) >> 8
        return Pillow.fromarray(grey.astype(np.uint8)).convert("RGB")
    picture.load()  # a PNG tells of transparency only now, if its tRNS chunk is late
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("RGB")


def _orientation(picture: Pillow.Image) -> int:
    """EXIF's 1 to 8; 1 where there is none or it is unreadable, as browsers do."""
    if "exif" not in picture.info and picture.format not in ("JPEG", "WEBP"):
        return 1
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF beside good pixels
        return 1


def _looks_like(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    for offset, magic, name in FOREIGN:
        if start[offset:].startswith(magic):
            return f"it looks like {name}"
    return f"its {len(data):,} bytes start with {data[:8].hex(' ')}"


class ImageReader:
    """Decodes and hashes off the event loop, in a few threads of its own (Pillow releases the GIL)."""

    def __init__(self, limits: ImageLimits, threads: int) -> None:
        self.limits = limits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def decode(self, data: bytes, views: Sequence[int] = (IMAGE_SIZE,)) -> Decoded:
        """Raises InvalidImage, TooLarge."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, decode, data, self.limits, views)

    async def identify(self, data: bytes) -> Image:
        """The image with its digest; says nothing of whether it can be decoded."""
        if len(data) <= INLINE_HASH_BYTES:
            return Image.of(data)
        return await asyncio.get_running_loop().run_in_executor(self._threads, Image.of, data)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class ImageStore:
    """Images by id, in memory: bounded in bytes, least recently used first to go, gone `ttl_s` after they were sent.

    Each counts IMAGE_ENTRY_BYTES more than its own bytes, so that very many very small ones are bounded too.

    `now` is in seconds since the epoch.
    """

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.nbytes = 0
        self._kept: OrderedDict[str, tuple[Image, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, image: Image, now: float) -> float:
        """Keeps the image and returns when it expires; sent again, it lives on from now."""
        self._drop(image.id)
        expires_at = now + self.ttl_s
        self._kept[image.id] = image, expires_at
        self.nbytes += len(image.data) + IMAGE_ENTRY_BYTES
        while self.nbytes > self.max_bytes or self._first_expires_at() <= now:
            self._drop(next(iter(self._kept)))
        return expires_at

    def get(self, image_id: str, now: float) -> Image:
        """Raises NotFound for an id that is unknown, expired or pushed out by later images."""
        image, expires_at = self._kept.get(image_id, (None, 0.0))
        if image is None or expires_at <= now:
            self._drop(image_id)
            raise NotFound(
                f"no image {image_id[:64]!r} here: it was never sent, or its time is over ({self.ttl_s:.0f} s); "
                "send it again with POST /v1/images",
                param="image",
                code="image_not_found",
            )
        self._kept.move_to_end(image_id)
        return image

    def _first_expires_at(self) -> float:
        """Of the one that nobody asked about for the longest."""
        _, expires_at = next(iter(self._kept.values()))
        return expires_at

    def _drop(self, image_id: str) -> None:
        image, _ = self._kept.pop(image_id, (None, 0.0))
        if image is not None:
            self.nbytes -= len(image.data) + IMAGE_ENTRY_BYTES
