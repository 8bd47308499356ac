"""Walk a TIFF: one of its pages, rebuilt from the tags and strips or tiles that the pixels need.

So a decoder never follows an offset that a caller wrote. Source: TIFF 6.0, and Adobe's supplements on Deflate and
predictors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from service.core.errors import InvalidImage
from service.media.fields import unpack
from service.media.pages import MAX_TIFF_PAGES

MAX_TAGS = 512  # of a page's directory; scanners and cameras write 15 to 60
MAX_PARTS = 100_000  # strips or tiles; one row each of the longest side are 65,535
MAX_SAMPLES = 5  # CMYK and alpha
TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}  # BYTE, SHORT, LONG
# By number: the most bytes that one compressed byte becomes, or 0 if there is no such bound.
COMPRESSIONS = {1: 1, 2: 0, 3: 0, 4: 0, 5: 1_400, 8: 1_040, 32_773: 64, 32_946: 1_040}
COMPRESSION_NAMES = {6: "JPEG", 7: "JPEG", 34_712: "JPEG 2000", 34_925: "LZMA", 50_000: "zstd", 50_001: "WebP"}
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1
PHOTOMETRICS = (WHITE_IS_ZERO, BLACK_IS_ZERO, 2, 3, 5)  # grey either way round, RGB, palette, CMYK
DEPTHS = (1, 2, 4, 8, 16)


class Tag(IntEnum):
    SUBFILE = 254
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS_PER_STRIP = 278
    STRIP_BYTES = 279
    PLANAR = 284
    T4_OPTIONS = 292
    T6_OPTIONS = 293
    PREDICTOR = 317
    COLOURS = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_BYTES = 325
    EXTRA_SAMPLES = 338
    SAMPLE_FORMAT = 339
    DNG_VERSION = 50_706


KEPT = (  # as they are
    *(Tag.WIDTH, Tag.HEIGHT, Tag.BITS, Tag.COMPRESSION, Tag.PHOTOMETRIC, Tag.FILL_ORDER, Tag.SAMPLES),
    *(Tag.ROWS_PER_STRIP, Tag.PLANAR, Tag.T4_OPTIONS, Tag.T6_OPTIONS, Tag.PREDICTOR, Tag.COLOURS),
    *(Tag.TILE_WIDTH, Tag.TILE_HEIGHT, Tag.EXTRA_SAMPLES, Tag.SAMPLE_FORMAT),
)
Tags = Mapping[Tag, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Tiff:
    width: int
    height: int
    data: bytes  # a TIFF of this picture alone, without its orientation
    is_short: bool
    is_negative: bool  # `data` has black for white: Pillow does not turn 16-bit grey round


def tiff_pages(data: bytes) -> int:
    """Count the pages, at most MAX_TIFF_PAGES. A file that is cut short may say that it has one more."""
    return max(1, len(_directories(data, MAX_TIFF_PAGES)))


def tiff_size(data: bytes, page: int = 1) -> tuple[int, int]:
    """Width and height of the page; zeros if they cannot be read. Raises InvalidImage."""
    tags = _tags(data, (Tag.WIDTH, Tag.HEIGHT), page, most=1)
    return _one(tags, Tag.WIDTH, 0), _one(tags, Tag.HEIGHT, 0)


def tiff_orientation(data: bytes, page: int = 1) -> int:
    """EXIF's 1 to 8 of the page. Raises InvalidImage."""
    orientation = _one(_tags(data, (Tag.ORIENTATION,), page, most=1), Tag.ORIENTATION, 1)
    return orientation if 1 <= orientation <= 8 else 1


def read_tiff(data: bytes, page: int = 1) -> Tiff:
    """Raises InvalidImage for a kind that is not read, or for more parts than an encoder writes."""
    tags = _tags(data, tuple(Tag), page)
    width, height = _one(tags, Tag.WIDTH, 0), _one(tags, Tag.HEIGHT, 0)
    _require_kind(tags)
    is_tiled = Tag.TILE_OFFSETS in tags
    places = tags.get(Tag.TILE_OFFSETS if is_tiled else Tag.STRIP_OFFSETS, ())
    sizes = tags.get(Tag.TILE_BYTES if is_tiled else Tag.STRIP_BYTES, ())
    count = _parts(tags, width, height, is_tiled=is_tiled) if width and height else 0
    places, sizes = places[:count], sizes[:count]
    if sum(sizes) > len(data):
        raise _not_read("has strips that share their bytes")
    ends = max((place + size for place, size in zip(places, sizes, strict=False)), default=0)
    short = len(places) < count or len(sizes) < count or ends > len(data) or _is_short(tags, sum(sizes))
    is_negative = _one(tags, Tag.PHOTOMETRIC, 9) == WHITE_IS_ZERO and _one(tags, Tag.BITS, 1) == 16
    if is_negative:
        tags = {**tags, Tag.PHOTOMETRIC: (BLACK_IS_ZERO,)}
    rebuilt = b"" if short else _rebuilt(data, tags, places, sizes, is_tiled=is_tiled)
    return Tiff(width, height, rebuilt, short, is_negative)


def _directories(data: bytes, most: int) -> list[int]:
    """Return where the directories of the first pages lie, at most so many. A chain that comes back ends there."""
    order = _order(data)
    (directory,) = unpack(f"{order}I", data, 4)
    found: dict[int, None] = {}
    while directory and directory not in found and len(found) < most:
        found[directory] = None
        (tags,) = unpack(f"{order}H", data, directory)
        (directory,) = unpack(f"{order}I", data, directory + 2 + 12 * tags)
    return list(found)


def _tags(data: bytes, wanted: Sequence[Tag], page: int, most: int = MAX_PARTS) -> Tags:
    """Return at most `most` values of each tag: those that it has where it stands first. Raises InvalidImage."""
    order = _order(data)
    directories = _directories(data, min(page, MAX_TIFF_PAGES))
    if len(directories) < page:
        return {}
    directory = directories[-1]
    (tags,) = unpack(f"{order}H", data, directory)
    if tags > MAX_TAGS:
        raise _not_read(f"has more than {MAX_TAGS} tags")
    found: dict[Tag, tuple[int, ...]] = {}
    for entry in range(directory + 2, directory + 2 + 12 * tags, 12):
        number, kind = unpack(f"{order}HH", data, entry)
        if number not in wanted or number in found or kind not in TYPES:
            continue
        (length,), (letter, nbytes) = unpack(f"{order}I", data, entry + 4), TYPES[kind]
        if length > MAX_PARTS:
            raise _not_read(f"has more than {MAX_PARTS:,} strips or tiles")
        place = entry + 8 if length * nbytes <= 4 else unpack(f"{order}I", data, entry + 8)[0]
        count = min(length, most)
        found[Tag(number)] = unpack(f"{order}{letter * count}", data, place) if count else ()
    return found


def _order(data: bytes) -> str:
    if data[2:4] in (b"+\0", b"\0+"):
        raise _not_read("is a BigTIFF")
    return "<" if data[:2] == b"II" else ">"


def _one(tags: Tags, tag: Tag, default: int) -> int:
    return (tags.get(tag) or (default,))[0]


def _require_kind(tags: Tags) -> None:
    """Raises InvalidImage."""
    compression = _one(tags, Tag.COMPRESSION, 1)
    if Tag.DNG_VERSION in tags or _one(tags, Tag.SUBFILE, 0) & 1:
        raise _not_read("is a camera's raw image, whose first picture is a thumbnail")
    if compression not in COMPRESSIONS:
        raise _not_read(f"is compressed with {COMPRESSION_NAMES.get(compression, f'method {compression}')}")
    bits = set(tags.get(Tag.BITS, (1,)))
    if (
        len(bits) != 1
        or not bits <= set(DEPTHS)
        or _one(tags, Tag.PHOTOMETRIC, 9) not in PHOTOMETRICS
        or not 1 <= _one(tags, Tag.SAMPLES, 1) <= MAX_SAMPLES
        or len(tags.get(Tag.BITS, (1,))) not in (1, _one(tags, Tag.SAMPLES, 1))
        or not set(tags.get(Tag.SAMPLE_FORMAT, (1,))) <= {1, 4}
        or _one(tags, Tag.PREDICTOR, 1) not in (1, 2)
        or _one(tags, Tag.PLANAR, 1) not in (1, 2)
    ):
        raise _not_read("has samples of a rare kind")


def _parts(tags: Tags, width: int, height: int, *, is_tiled: bool) -> int:
    """How many strips or tiles the picture has. Raises InvalidImage."""
    planes = _one(tags, Tag.SAMPLES, 1) if _one(tags, Tag.PLANAR, 1) == 2 else 1
    if is_tiled:
        across, down = _one(tags, Tag.TILE_WIDTH, 0), _one(tags, Tag.TILE_HEIGHT, 0)
        if not across or not down:
            raise _not_read("has tiles without a size")
        columns, rows = -(-width // across), -(-height // down)
        if columns * across * rows * down > 4 * width * height + 1_048_576:
            raise _not_read("has tiles that are much larger than the picture")
    else:
        columns, rows = 1, -(-height // min(max(_one(tags, Tag.ROWS_PER_STRIP, height), 1), height))
    if columns * rows * planes > MAX_PARTS:
        raise _not_read(f"has more than {MAX_PARTS:,} strips or tiles")
    return columns * rows * planes


def _is_short(tags: Tags, nbytes: int) -> bool:
    """Whether so many bytes cannot hold the pixels."""
    width, height = _one(tags, Tag.WIDTH, 0), _one(tags, Tag.HEIGHT, 0)
    row = (width * _one(tags, Tag.BITS, 1) * _one(tags, Tag.SAMPLES, 1) + 7) // 8
    ratio = COMPRESSIONS[_one(tags, Tag.COMPRESSION, 1)]
    return bool(ratio) and row * height > ratio * (nbytes + 64 * (ratio > 1))


def _rebuilt(data: bytes, tags: Tags, places: Sequence[int], sizes: Sequence[int], *, is_tiled: bool) -> bytes:
    """A TIFF with the kept tags and the parts one behind the other."""
    order = _order(data)
    parts = b"".join(data[place : place + size] for place, size in zip(places, sizes, strict=True))
    values = {tag: tags[tag] for tag in KEPT if tag in tags}
    starts, end = [], 8
    for size in sizes:
        starts.append(end)
        end += size
    values[Tag.TILE_OFFSETS if is_tiled else Tag.STRIP_OFFSETS] = tuple(starts)
    values[Tag.TILE_BYTES if is_tiled else Tag.STRIP_BYTES] = tuple(sizes)
    entries, outside = [], b""
    first = end + end % 2 + 2 + 12 * len(values) + 4  # behind the directory
    for tag in sorted(values):
        kind = 4 if max(values[tag], default=0) > 65_535 or tag in (Tag.STRIP_OFFSETS, Tag.TILE_OFFSETS) else 3
        packed = struct.pack(f"{order}{len(values[tag])}{TYPES[kind][0]}", *values[tag])
        if len(packed) > 4:
            held = struct.pack(f"{order}I", first + len(outside))
            outside += packed + bytes(len(packed) % 2)
        else:
            held = packed.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values[tag])) + held)
    head = data[:4] + struct.pack(f"{order}I", end + end % 2)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return b"".join((head, parts, bytes(end % 2), directory, outside))


def _not_read(what: str) -> InvalidImage:
    return InvalidImage(f"the TIFF {what}, which is not read: save it as PNG", param="image")
