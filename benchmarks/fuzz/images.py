"""Mutated image files. Number and seed determine each one, so that any of them can be made again alone."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random

from benchmarks.bench.load import form
from benchmarks.fuzz.parts import format_of, mended, parts_of
from benchmarks.fuzz.pictures import PNG_SIGNATURE, files, png_chunk
from benchmarks.fuzz.sending import Mutant, request

MAX_BYTES = 400_000
BYTES = (0, 1, 2, 0x7F, 0x80, 0xD8, 0xD9, 0xDA, 0xFE, 0xFF)
SIDES = (0, 1, 2, 3, 7, 223, 224, 448, 4096, 7071, 16_383, 16_384, 32_767, 32_768, 65_534, 65_535)
LARGE_SIDES = (65_536, 70_000, 50_000_000, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
REPEATS = (2, 3, 10, 40, 300, 2000)
MAGIC = (b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF89a", b"GIF87a", b"RIFF\x10\0\0\0WEBP", b"BM", b"II*\0", b"%PDF", b"<svg")
JPEG_TABLES = (0xC4, 0xDB, 0xDD, 0xCC)  # Huffman, quantisation, restarts, arithmetic
LENGTHS = {"JPEG": (">H", 2), "PNG": (">I", 0), "WEBP": ("<I", 4), "MP4": (">I", 0), "EBML": (">B", 1)}  # in a part
QUESTION = "what is it?"

Mutation = Callable[[Random, bytes], bytes]


def _place(random: Random, data: bytes) -> int:
    """Near the file's start as often as anywhere: that is where formats are decided."""
    return random.randrange(min(len(data), 64) if random.random() < 0.5 else len(data)) if data else 0


def flip_bits(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16, 64)) if data else 0):
        changed[_place(random, data)] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_bytes(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        changed[_place(random, data)] = random.choice(BYTES)
    return bytes(changed)


def truncate(random: Random, data: bytes) -> bytes:
    return data[: random.choice((random.randrange(len(data) + 1), max(0, len(data) - random.randrange(1, 20))))]


def extend(random: Random, data: bytes) -> bytes:
    return data + random.choice((random.randbytes(random.randrange(1, 5000)), bytes(5000), _file(random)))


def splice(random: Random, data: bytes) -> bytes:
    """The start of one file and the end of another."""
    other = _file(random)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other)) :]


def move_range(random: Random, data: bytes) -> bytes:
    """Drop, repeat or move some bytes."""
    start = random.randrange(len(data) + 1)
    taken = data[start : start + random.choice((1, 2, 4, 16, 256, 4096))]
    rest = data[:start] + data[start + len(taken) :]
    place = random.randrange(len(rest) + 1)
    return random.choice((rest, data[:place] + taken + data[place:], rest[:place] + taken + rest[place:]))


def rearrange_parts(random: Random, data: bytes) -> bytes:
    """Drop, repeat, swap or move whole segments, chunks or blocks."""
    first, *parts = parts_of(data)
    if not parts:
        return data
    chosen = random.randrange(len(parts))
    match random.randrange(5):
        case 0:
            del parts[chosen]
        case 1:
            parts[chosen] *= min(random.choice(REPEATS), MAX_BYTES // (len(parts[chosen]) + 1) + 1)
        case 2:
            parts.insert(random.randrange(len(parts) + 1), parts.pop(chosen))
        case 3:
            other = random.randrange(len(parts))
            parts[chosen], parts[other] = parts[other], parts[chosen]
        case _:
            random.shuffle(parts)
    return first + b"".join(parts)


def insert_part(random: Random, data: bytes) -> bytes:
    """A part of another file, of the same format as often as not."""
    names = [name for name in files() if name.startswith(format_of(data))] if random.random() < 0.7 else list(files())
    donor = parts_of(files()[random.choice(names or list(files()))])
    first, *parts = parts_of(data)
    parts.insert(random.randrange(len(parts) + 1), random.choice(donor))
    return first + b"".join(parts)


def edit_length(random: Random, data: bytes) -> bytes:
    """Of one part: its own count of its bytes becomes a lie."""
    first, *parts = parts_of(data)
    if not parts:
        return data
    chosen = random.randrange(len(parts))
    part = bytearray(parts[chosen])
    layout, at = LENGTHS.get(format_of(data), ("<B", len(part) // 2))
    if len(part) < at + struct.calcsize(layout):
        return data
    (length,) = struct.unpack_from(layout, part, at)
    most = 256 ** struct.calcsize(layout)
    lies = (0, 1, 2, length - 1, length + 1, length * 2, most // 2, most - 1, random.randrange(most))
    struct.pack_into(layout, part, at, random.choice(lies) % most)
    parts[chosen] = bytes(part)
    return first + b"".join(parts)


def change_inside(random: Random, data: bytes) -> bytes:
    """Bytes of one part only; without its name and length, so that it is read as what it was."""
    first, *parts = parts_of(data)
    if not parts:
        return data
    chosen = random.randrange(len(parts))
    head = {"JPEG": 4, "PNG": 8, "WEBP": 8, "GIF": 2, "MP4": 8, "EBML": 2}.get(format_of(data), 0)
    part = parts[chosen]
    parts[chosen] = part[:head] + random.choice((flip_bits, set_bytes))(random, part[head:])
    return first + b"".join(parts)


def resize(random: Random, data: bytes) -> bytes:
    """Another width or height in the header, huge ones too."""
    changed = bytearray(data)
    layout, at = _size_field(data)
    size = struct.calcsize(layout)
    for place in {0: (at,), 1: (at + size,), 2: (at, at + size)}[random.randrange(3)]:
        if len(changed) >= place + size:
            side = random.choice(SIDES if size == 2 or random.random() < 0.6 else LARGE_SIDES)
            struct.pack_into(layout, changed, place, side % 256**size)
    return bytes(changed)


def _size_field(data: bytes) -> tuple[str, int]:
    """Where two sides stand, and how. Anywhere if the format is not known."""
    match format_of(data):
        case "PNG":
            return ">I", 16
        case "GIF":
            frame = data.find(b"\x2c")
            return "<H", 6 if frame < 0 or len(data) % 2 else frame + 5
        case "WEBP":
            return "<H", 26 if data[12:16] == b"VP8 " else 24 if data[12:16] == b"VP8X" else 21
        case "JPEG":
            frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
            return ">H", max(frame, 0) + 5
    return "<H", 4


def change_header(random: Random, data: bytes) -> bytes:
    """The fields that say how to decode: depth, colours, components, tables, scan parameters."""
    changed = bytearray(data)
    match format_of(data):
        case "PNG":
            places = range(24, 29)
        case "JPEG":
            first, *parts = parts_of(data)
            starts, offset = [], len(first)
            for part in parts:
                if part[1:2] and (part[1] in JPEG_TABLES or part[1] in (0xC0, 0xC1, 0xC2, 0xDA, 0xEE)):
                    starts.append(offset)
                offset += len(part)
            start = random.choice(starts or [2])
            places = range(start, start + 24)
        case "WEBP":
            places = range(12, 40)
        case "GIF":
            frame = max(data.find(b"\x2c"), 10)
            places = range(10, 13) if random.random() < 0.4 else range(frame, frame + 14)
        case _:
            places = range(16)
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.choice(places)
        if place < len(changed):
            changed[place] = random.choice((*BYTES, 3, 4, 6, 8, 16, random.randrange(256)))
    return bytes(changed)


def change_pixels(random: Random, data: bytes) -> bytes:
    """A PNG's pixels packed anew after a change: other filters, too few, too many, or a megabyte of zeros."""
    if format_of(data) != "PNG":
        return change_inside(random, data)
    first, *chunks = parts_of(data)
    packed = b"".join(chunk[8:-4] for chunk in chunks if chunk[4:8] == b"IDAT")
    try:
        raw = zlib.decompressobj().decompress(packed, 2_000_000)
    except zlib.error:
        return data
    raw = random.choice((
        lambda: flip_bits(random, raw),
        lambda: set_bytes(random, raw),
        lambda: raw[: random.randrange(len(raw) + 1)],
        lambda: raw + bytes(random.choice((1, 1000, 1_000_000))),
        lambda: b"",
    ))()  # fmt: skip
    anew = zlib.compress(raw, random.choice((0, 1)))
    cut = random.randrange(len(anew) + 1)
    others = [chunk for chunk in chunks if chunk[4:8] != b"IDAT"]
    pieces = [png_chunk(b"IDAT", piece) for piece in random.choice(((anew,), (anew[:cut], anew[cut:])))]
    return first + b"".join([*others[:-1], *pieces, *others[-1:]])


def change_magic(random: Random, data: bytes) -> bytes:
    magic = random.choice(MAGIC)
    return magic + data[len(magic) if random.random() < 0.7 else 0 :]


def add_exif(random: Random, data: bytes) -> bytes:
    """A directory of random tags, which may point anywhere."""
    order, name = random.choice(((">", b"MM\0*"), ("<", b"II*\0")))
    count = random.choice((0, 1, 3, 400, 65_535))
    tags = b"".join(
        struct.pack(f"{order}HHII", random.choice((0x0112, 0x8769, 0x0201, random.randrange(65_536))),
                    random.randrange(14), random.choice((0, 1, 2**32 - 1)), random.randrange(2**32))
        for _ in range(min(count, 20))
    )  # fmt: skip
    directory = struct.pack(f"{order}I", random.choice((8, 8, 8, 0, 2**32 - 1, 4)))
    exif = b"Exif\0\0" + name + directory + struct.pack(f"{order}H", count) + tags
    first, *parts = parts_of(data)
    match format_of(data):
        case "JPEG":
            part = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        case "PNG":
            part = png_chunk(b"eXIf", exif[6:])
        case "WEBP":
            part = b"EXIF" + struct.pack("<I", len(exif)) + exif + bytes(len(exif) % 2)
        case _:
            part = exif
    parts.insert(random.choice((0, len(parts) // 2, len(parts))), part)
    return first + b"".join(parts)


MUTATIONS: Sequence[Mutation] = (
    flip_bits, set_bytes, truncate, extend, splice, move_range, rearrange_parts, insert_part, edit_length,
    change_inside, change_inside, resize, change_header, change_header, change_pixels, change_magic, add_exif,
)  # fmt: skip


def _file(random: Random) -> bytes:
    return random.choice(list(files().values()))


def image(seed: int, number: int) -> tuple[bytes, tuple[str, ...]]:
    """A mutated file, and the names of the file and of its mutations."""
    random = Random(f"image {seed} {number}")
    name = random.choice(list(files()))
    data, done = files()[name], [name]
    for _ in range(random.choice((1, 1, 2, 3, 5))):
        mutation = random.choice(MUTATIONS)
        data = mutation(random, data)[:MAX_BYTES]
        done.append(mutation.__name__)
    if random.random() < 0.85:
        data = mended(data)
    return data, tuple(done)


def mutant(seed: int, number: int) -> Mutant:
    """The file in a request: mostly alone to POST /v1/images, else in a form or in a question."""
    data, done = image(seed, number)
    match number % 20:
        case 0:
            body, kind = form({"question": QUESTION, "max_tokens": 1}, [data])
            sent = request("/v1/vqa", body, kind)
        case 1:
            asked = {"image": base64.b64encode(data).decode(), "question": QUESTION, "max_tokens": 1}
            sent = request("/v1/vqa", json.dumps(asked).encode(), "application/json")
        case 2:
            sent = request("/v1/images", *form({}, [data]))
        case _:
            sent = request("/v1/images", data, "image/jpeg")
    return Mutant(sent, done)
