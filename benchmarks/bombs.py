"""Image files that are small or legal, and cost a naive decoder seconds or gigabytes."""

from __future__ import annotations

import struct
import zlib

from PIL import Image as Pillow

from benchmarks.pictures import encoded, picture

MEGABYTES = 19_000_000


def png_chunk(name: bytes, content: bytes = b"") -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def png(width: int, height: int, *, before: bytes = b"", after: bytes = b"", depth: int = 1, colours: int = 0) -> bytes:
    """A black PNG, with chunks before and after its pixels."""
    channels = {0: 1, 2: 3, 6: 4}[colours]
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth * channels + 7) // 8)
    some = min(height, 1_000_000 // len(row) + 1)
    parts = [packer.compress(row * min(some, height - done)) for done in range(0, height, some)]
    pixels = b"".join([*parts, packer.flush()])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"".join([
        b"\x89PNG\r\n\x1a\n", header, before, png_chunk(b"IDAT", pixels), after, png_chunk(b"IEND")
    ])  # fmt: skip


def jpeg(segments: bytes = b"", **options: object) -> bytes:
    """A JPEG with segments before its own."""
    data = encoded(picture(64, 64), "JPEG", **options)
    return data[:2] + segments + data[2:]


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive grey JPEG of one true scan and `count` refinements that hold nothing."""
    data = encoded(Pillow.new("L", (8, 8)), "JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    sized = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + b"\x00"
    return sized[:-2] + empty * count + b"\xff\xd9"


def gif(blocks: bytes) -> bytes:
    """A GIF with extension blocks before its one frame."""
    data = encoded(picture(64, 64), "GIF")
    start = 13 + (3 << (data[10] & 7) + 1)
    return data[:start] + blocks + data[start:]


def webp(chunks: bytes, *, before: bool = False) -> bytes:
    """A WebP with chunks after its pixels, or before them."""
    data = encoded(picture(64, 64), "WEBP", exif=b"Exif\0\0MM\0*")
    body = data[12:30] + chunks + data[30:] if before else data[12:] + chunks
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_chunk(name: bytes, content: bytes = b"") -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def tiff(tags: list[tuple[int, int, int, int]], after: bytes = b"") -> bytes:
    """A little-endian TIFF: number, type, count and value of each tag. `after` stands behind the directory."""
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(struct.pack("<HHII", *each) for each in tags) + bytes(4) + after


def grey_tiff(width: int, height: int, *more: tuple[int, int, int, int], after: bytes = b"") -> bytes:
    """A grey TIFF, which says nothing of its strips unless `more` does."""
    size = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff(sorted([*size, *more]), after)


def strips(count: int, nbytes: int) -> bytes:
    """A TIFF whose strips are all the same bytes."""
    places, sizes = struct.pack("<I", 8) * count, struct.pack("<I", nbytes) * count
    start = 10 + 12 * 8 + 4
    parts = ((273, 4, count, start), (278, 3, 1, 1), (279, 4, count, start + 4 * count))
    return grey_tiff(700, count, *parts, after=places + sizes)


def bmp(width: int, height: int) -> bytes:
    """A BMP of 24 bits without its pixels."""
    return b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, width, height, 1, 24) + bytes(24)


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def avif(*boxes: bytes) -> bytes:
    """The head of an AVIF, and boxes in its `meta`."""
    return box(b"ftyp", b"avif\0\0\0\0mif1avif") + box(b"meta", bytes(4) + b"".join(boxes))


def extents(count: int) -> bytes:
    """An AVIF's item in many extents, each of which is all of the file."""
    place = struct.pack(">BBHHHHHH", 0, 0, 0, 0x4400, 1, 1, 0, count)
    return box(b"iloc", place + bytes(8) * count)


BOMBS = {
    "TIFF tags": lambda: tiff([(700, 1, 1, 0)] * 60_000),
    "TIFF strips": lambda: grey_tiff(700, 700, (273, 4, 4_000_000, 8), after=bytes(16_000_000)),
    "TIFF strips that share bytes": lambda: strips(60_000, 400_000),
    "TIFF tiles larger than the picture": lambda: grey_tiff(
        64, 64, (322, 4, 1, 65_520), (323, 4, 1, 65_520), (324, 4, 1, 8), (325, 4, 1, 100)
    ),
    "more pixels than the TIFF can hold": lambda: grey_tiff(
        7000, 7000, (259, 3, 1, 8), (273, 4, 1, 8), (279, 4, 1, 100), after=bytes(100)
    ),
    "a wide TIFF": lambda: grey_tiff(4_000_000_000, 4_000_000_000, (273, 4, 1, 8), (279, 4, 1, 9)),
    "a wide BMP": lambda: bmp(50_000_000, 1),
    "more pixels than the BMP holds": lambda: bmp(7000, 7000),
    "AVIF boxes": lambda: avif(box(b"free") * (MEGABYTES // 8)),
    "AVIF boxes behind each other": lambda: avif() + box(b"free") * (MEGABYTES // 8),
    "AVIF properties": lambda: avif(box(b"iprp", box(b"ipco", box(b"free") * (MEGABYTES // 8)))),
    "AVIF items": lambda: avif(box(b"iinf", bytes(6) + box(b"infe", bytes(12)) * (MEGABYTES // 20))),
    "AVIF references": lambda: avif(box(b"iref", bytes(4) + box(b"dimg", b"\0\1\xff\xff" + bytes(131_070)) * 140)),
    "AVIF extents": lambda: avif(extents(60_000)),
    "AVIF boxes in each other": lambda: avif(*[box(b"iprp", box(b"ipco", box(b"iprp")))] * 600),
    "1,000 empty scans": lambda: scans(4000, 4000, 1000),
    "4,500 empty scans": lambda: scans(7000, 7000, 4500),
    "33 empty scans of a small picture": lambda: scans(64, 64, 33),
    "20 empty scans of a large picture": lambda: scans(7000, 7000, 20),
    "fill bytes": lambda: jpeg(b"\xff" * MEGABYTES),
    "fill bytes in short runs": lambda: jpeg((b"\xff" * 1000 + b"\xe5\0\2") * 20),
    "fill bytes inside a scan": lambda: jpeg()[:-2] + b"\xff" * MEGABYTES + b"\xff\xd9",
    "long comments": lambda: jpeg((b"\xff\xfe\xff\xff" + bytes(65533)) * 290),
    "short comments": lambda: jpeg(b"\xff\xfe\0\2" * (MEGABYTES // 4)),
    "segments between scans": lambda: jpeg(progressive=True).replace(b"\xff\xda", b"\xff\xe5\0\2" * 5000 + b"\xff\xda"),
    "long profiles": lambda: jpeg((b"\xff\xe2\xff\xff" + bytes(65533)) * 290),
    "GIF comments": lambda: gif((b"!\xfe" + (b"\xff" + bytes(255)) * 1000 + b"\0") * 70),
    "short GIF comments": lambda: gif(b"!\xfe\1x\0" * (MEGABYTES // 5)),
    "GIF extensions": lambda: gif(b"!\xf9\x04\0\0\0\0\0" * (MEGABYTES // 8)),
    "small PNG chunks": lambda: png(64, 64, before=png_chunk(b"vpAg") * (MEGABYTES // 12)),
    "small PNG texts": lambda: png(64, 64, before=png_chunk(b"tEXt", b"a\0b") * (MEGABYTES // 15)),
    "small PNG chunks behind the pixels": lambda: png(64, 64, after=png_chunk(b"tIME", bytes(7)) * (MEGABYTES // 19)),
    "empty PNG pixel chunks": lambda: png(64, 64, before=png_chunk(b"IDAT") * (MEGABYTES // 12)),
    "long PNG texts": lambda: png(64, 64, before=png_chunk(b"tEXt", b"a\0" + bytes(MEGABYTES))),
    "small WebP chunks": lambda: webp(webp_chunk(b"abcd") * (MEGABYTES // 8)),
    "small WebP chunks before the pixels": lambda: webp(webp_chunk(b"abcd") * (MEGABYTES // 8), before=True),
    "long WebP metadata": lambda: webp(webp_chunk(b"XMP ", bytes(MEGABYTES))),
    "a wide picture": lambda: png(50_000_000, 1),
    "a tall picture": lambda: png(1, 50_000_000),
    "a wide picture of colours": lambda: png(65_536, 700, depth=8, colours=6),
    "more pixels than the bytes can hold": lambda: png(7000, 7000)[:900] + png_chunk(b"IEND"),
}
