"""Walk the boxes of an AVIF or a HEIC, and find the size of its picture.

Both are the same container (ISO/IEC 14496-12 and 23008-12, HEIF). The picture is one coded item, or a grid of them, and
properties say its size and how it is turned. What the decoder may follow is counted: boxes, items, references, and the
bytes and pixels of all that the picture is made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from service.core.errors import InvalidImage
from service.media.fields import unpack

MAX_BOXES = 1024
MAX_ENTRIES = 4096  # items, references, associations and extents, each; a phone's 48 megapixels are 192 tiles
MAX_CODED = 4  # pixels coded for each that is shown: tiles' edges, what is cut off, transparency
MAX_BRANDS_BYTES = 256
MORE_CODED = 4_194_304  # for small pictures: one tile of 2048x2048
CONTAINERS = (b"iprp", b"ipco")
CODECS: dict[bytes, Literal["AVIF", "HEIF"]] = {b"av01": "AVIF", b"hvc1": "HEIF"}
# EXIF's orientation by the mirror's axis (None: no mirror) and the quarter turns to the left that come before it.
ORIENTATIONS = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}


@dataclass(frozen=True, slots=True)
class IsoPicture:
    format: Literal["AVIF", "HEIF"]
    width: int  # before it is turned
    height: int
    data: bytes  # without films


@dataclass(slots=True)
class _Boxes:
    """What the file's boxes say."""

    primary: int = 0
    items: dict[int, bytes] = field(default_factory=dict)  # type by id
    properties: list[tuple[bytes, int, int]] = field(default_factory=list)  # type, start and end
    uses: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # properties by item
    made_of: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # a grid's tiles
    beside: list[int] = field(default_factory=list)  # items that say something about the picture: transparency
    nbytes: int = 0  # of all items
    films: list[int] = field(default_factory=list)  # where their boxes' types are
    counted: int = 0

    def count(self, entries: int) -> None:
        """Raises InvalidImage."""
        self.counted += entries
        if self.counted > MAX_ENTRIES:
            raise _not_read(f"has more than {MAX_ENTRIES:,} entries in its boxes")


def iso_size(data: bytes) -> tuple[int, int]:
    """Width and height before the picture is turned; zeros if they cannot be read. Raises InvalidImage."""
    return _shown(data, _read(data))


def iso_orientation(data: bytes) -> int:
    """EXIF's 1 to 8 by the picture's properties. Raises InvalidImage."""
    return _orientation(data, _read(data))


def read_iso(data: bytes) -> IsoPicture:
    """Raises InvalidImage if there is no still picture of a known codec, or more than an encoder writes."""
    found = _read(data)
    width, height = _shown(data, found)
    tiles = found.made_of[found.primary]
    kinds = {found.items.get(item, b"") for item in (tiles or [found.primary])}
    kind = next(iter(kinds)) if len(kinds) == 1 else b""
    if kind not in CODECS or (tiles and found.items.get(found.primary) != b"grid"):
        raise _not_read("holds no still picture of AV1 or HEVC")
    coded = 0
    for item in [found.primary, *found.beside]:
        for part in found.made_of[item] or [item]:
            across, down = _size(data, found, part)
            coded += across * down
    if coded > MAX_CODED * width * height + MORE_CODED:
        raise _not_read("codes many more pixels than it shows")
    if found.nbytes > 2 * len(data):
        raise _not_read("has items that share their bytes")
    return IsoPicture(CODECS[kind], width, height, _without_films(data, found))


def _read(data: bytes) -> _Boxes:
    found, steps = _Boxes(), 0
    waiting = [(0, len(data))]
    while waiting:
        for kind, start, end in boxes(data, *waiting.pop()):
            steps += 1
            if steps > MAX_BOXES:
                raise _not_read(f"has more than {MAX_BOXES:,} boxes")
            if kind == b"meta":
                waiting.append((start + 4, end))
            elif kind in CONTAINERS:
                waiting.append((start, end))
                if kind == b"ipco":
                    for each in boxes(data, start, end):
                        found.count(1)
                        found.properties.append(each)
            elif kind in (b"moov", b"moof"):
                found.films.append(data.rfind(kind, 0, start))
            else:
                _read_box(data, found, kind, start, end)
    return found


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the boxes' contents."""
    while start + 8 <= end:
        (size,), kind, head = unpack(">I", data, start), data[start + 4 : start + 8], 8
        if size == 1:
            (size,), head = unpack(">Q", data, start + 8), 16
        if size == 0:
            size = end - start
        if size < head or start + size > end:
            return
        yield kind, start + head, start + size
        start += size


def _read_box(data: bytes, found: _Boxes, kind: bytes, start: int, end: int) -> None:
    version, flags = data[start] if start < end else 0, unpack(">I", data, start)[0] & 0xFFFFFF
    if kind == b"pitm":
        (found.primary,) = unpack(">I" if version else ">H", data, start + 4)
    elif kind == b"iinf":
        start += 8 if version else 6
        for name, at, _ in boxes(data, start, end):
            found.count(1)
            if name == b"infe":
                long = unpack(">B", data, at)[0] >= 3
                (item,) = unpack(">I" if long else ">H", data, at + 4)
                found.items[item] = data[at + (10 if long else 8) : at + (14 if long else 12)]
    elif kind == b"iref":
        _read_references(data, found, ">I" if version else ">H", start + 4, end)
    elif kind == b"ipma":
        _read_associations(data, found, ">I" if version else ">H", start + 4, is_long=bool(flags & 1))
    elif kind == b"iloc":
        _read_extents(data, found, version, start + 4)


def _read_references(data: bytes, found: _Boxes, number: str, start: int, end: int) -> None:
    nbytes = 4 if number == ">I" else 2
    for kind, at, _ in boxes(data, start, end):
        (item,), (count,) = unpack(number, data, at), unpack(">H", data, at + nbytes)
        found.count(1 + count)
        to = [unpack(number, data, at + nbytes + 2 + nbytes * each)[0] for each in range(count)]
        if kind == b"dimg":
            found.made_of[item] += to
        elif kind == b"auxl" and found.primary in to:
            found.beside.append(item)


def _read_associations(data: bytes, found: _Boxes, number: str, at: int, *, is_long: bool) -> None:
    (items,) = unpack(">I", data, at)
    at += 4
    found.count(items)
    for _ in range(items):
        (item,) = unpack(number, data, at)
        at += 4 if number == ">I" else 2
        (uses,) = unpack(">B", data, at)
        at += 1
        found.count(uses)
        for _ in range(uses):
            (index,) = unpack(">H" if is_long else ">B", data, at)
            at += 2 if is_long else 1
            found.uses[item].append(index & (0x7FFF if is_long else 0x7F))


def _read_extents(data: bytes, found: _Boxes, version: int, at: int) -> None:
    (sizes,) = unpack(">H", data, at)
    offset_bytes, length_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0
    (items,) = unpack(">H" if version < 2 else ">I", data, at + 2)
    at += 4 if version < 2 else 6
    found.count(items)
    for _ in range(items):
        at += (2 if version < 2 else 4) + (2 if version else 0) + 2 + base_bytes
        (extents,) = unpack(">H", data, at)
        at += 2
        found.count(extents)
        for _ in range(extents):
            at += index_bytes + offset_bytes
            found.nbytes += int.from_bytes(data[at : at + length_bytes], "big") or len(data)  # 0: all there is
            at += length_bytes


def _uses(found: _Boxes, item: int) -> Iterator[tuple[bytes, int, int]]:
    for index in found.uses.get(item, ()):
        if 1 <= index <= len(found.properties):
            yield found.properties[index - 1]


def _size(data: bytes, found: _Boxes, item: int) -> tuple[int, int]:
    for kind, start, _ in _uses(found, item):
        if kind == b"ispe":
            width, height = unpack(">II", data, start + 4)
            return width, height
    return 0, 0


def _shown(data: bytes, found: _Boxes) -> tuple[int, int]:
    """Width and height of what the decoder shows, before it is turned.

    A HEIC's decoder cuts the picture to its clean aperture, whose sides it rounds; an AVIF's does not.
    """
    width, height = _size(data, found, found.primary)
    is_cut = b"av01" not in {found.items.get(item) for item in (found.primary, *found.made_of[found.primary])}
    is_sideways = False
    for kind, start, end in _uses(found, found.primary) if is_cut else ():
        if kind == b"irot" and start < end:
            is_sideways ^= bool(data[start] & 1)
        elif kind == b"clap":
            sides = [
                (side + parts // 2) // parts if parts else 0
                for side, parts in (unpack(">II", data, start), unpack(">II", data, start + 8))
            ]
            across, down = reversed(sides) if is_sideways else sides
            width, height = min(width, across), min(height, down)
    return width, height


def _orientation(data: bytes, found: _Boxes) -> int:
    turns, axis = 0, None
    for kind, start, end in _uses(found, found.primary):
        if kind == b"irot" and start < end:
            turns = data[start] & 3
        elif kind == b"imir" and start < end:
            axis = data[start] & 1
    return ORIENTATIONS[axis][turns]


def _without_films(data: bytes, found: _Boxes) -> bytes:
    """Films are renamed to free space, so that all offsets stay as they are, and the file no longer says it has one."""
    changed = bytearray(data)
    for start in found.films:
        changed[start : start + 4] = b"free"
    (length,) = unpack(">I", data, 0)
    for place in range(8, min(length, MAX_BRANDS_BYTES), 4):
        if changed[place : place + 4] == b"avis":
            changed[place : place + 4] = b"avif"
    return bytes(changed)


def _not_read(what: str) -> InvalidImage:
    return InvalidImage(f"the AVIF or HEIC {what}, which is not read: save it as PNG", param="image")
