import mmap
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from benchmarks.bombs import BOMBS, webp_chunk
from service.core.errors import InvalidImage
from service.media.decoder import decode
from service.media.exif import SIDEWAYS
from service.media.header import header_size, orientation_of, upright_size
from service.media.structure import structure_of
from tests.support.pictures import LIMITS, encoded, picture


def header_pixels(data: bytes) -> int | None:
    size = header_size(data)
    return None if size is None else size[0] * size[1]


@pytest.mark.parametrize("size", [(1, 1), (224, 224), (1037, 3), (5, 700)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(5000), "comment": b"x" * 60_000}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(50)}),
    ],
)
def test_pixels_are_known_from_the_header(kind, options, size):
    data = encoded(picture(*size), kind, **options)
    assert header_pixels(data) == size[0] * size[1]


KINDS = ["PNG", "GIF", "JPEG", "WEBP", "AVIF", "TIFF", "BMP"]


@given(st.sampled_from(KINDS), st.integers(0, 200), st.binary(max_size=60))
def test_headers_that_are_cut_or_wrong_do_no_harm(kind, kept, rest):
    whole = encoded(Pillow.new("RGB", (8, 8)), kind)
    assert header_pixels(whole) == 64
    pixels = header_pixels(whole[:kept] + rest)
    assert pixels is None or pixels >= 0


# None: too much stands before the size, or there is none.
SIZES: dict[str, tuple[int, int] | None] = {
    "TIFF tags": None,
    "TIFF strips": (700, 700),
    "TIFF strips that share bytes": (700, 60000),
    "TIFF tiles larger than the picture": (64, 64),
    "more pixels than the TIFF can hold": (7000, 7000),
    "a wide TIFF": (4000000000, 4000000000),
    "a wide BMP": (50000000, 1),
    "more pixels than the BMP holds": (7000, 7000),
    "AVIF boxes": None,
    "AVIF boxes behind each other": None,
    "AVIF properties": None,
    "AVIF items": None,
    "AVIF references": None,
    "AVIF extents": None,
    "AVIF boxes in each other": None,
    "1,000 empty scans": (4000, 4000),
    "4,500 empty scans": (7000, 7000),
    "33 empty scans of a small picture": (64, 64),
    "20 empty scans of a large picture": (7000, 7000),
    "fill bytes": None,
    "fill bytes in short runs": None,
    "fill bytes inside a scan": (64, 64),
    "long comments": (64, 64),
    "short comments": None,
    "segments between scans": (64, 64),
    "long profiles": (64, 64),
    "GIF comments": None,
    "short GIF comments": None,
    "GIF extensions": None,
    "small PNG chunks": (64, 64),
    "small PNG texts": (64, 64),
    "small PNG chunks behind the pixels": (64, 64),
    "empty PNG pixel chunks": (64, 64),
    "long PNG texts": (64, 64),
    "small WebP chunks": (64, 64),
    "small WebP chunks before the pixels": (64, 64),
    "long WebP metadata": (64, 64),
    "a wide picture": (50000000, 1),
    "a tall picture": (1, 50000000),
    "a wide picture of colours": (65536, 700),
    "more pixels than the bytes can hold": (7000, 7000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bombs_header_is_read_or_not_and_does_not_fail(name):
    assert header_size(BOMBS[name]()) == SIZES[name]


def test_a_jpeg_of_segments_without_end_is_not_followed():
    assert header_pixels(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1_000_000) is None
    assert header_pixels(b"\xff\xd8" + b"\xff" * 1_000_000) is None


def large(kind: str) -> bytes:
    return encoded(Pillow.new("L", (1500, 1000)), kind)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


PNG, JPEG, GIF = large("PNG"), large("JPEG"), large("GIF")
SMALL_IHDR = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (GIF[:6] + b"\1\0\1\0" + GIF[10:], 1_500_000),  # a frame larger than the screen
        (GIF[:6] + b"\1\0\1\0" + GIF[10:25] + b"!\xfe\1x\0" * 300 + GIF[25:], 1_500_000),
        (JPEG[:2] + b"\xff\xfe\0\2" * 600 + JPEG[2:], 1_500_000),
        (PNG[:8] + png_chunk(b"tEXt", b"\0\0\0\1\0\0\0\1") + PNG[8:], None),
        (GIF[:6] + b"\1\0\1\0" + GIF[10:25] + b"!\xfe\1x\0" * 3000 + GIF[25:], None),
        (JPEG[:2] + b"\xff\xfe\0\2" * 1100 + JPEG[2:], None),
        (PNG[:8] + SMALL_IHDR + PNG[8:], 1),
    ],
)
def test_a_header_cannot_tell_less_than_is_decoded(data, told):
    """The whole size, or None for the most that is allowed. What tells two sizes, or none, is not decoded."""
    assert header_pixels(data) == told
    if told == 1_500_000:
        assert decode(data, LIMITS).width == 1500
    else:
        with pytest.raises(InvalidImage, match=r"two headers|more than|cannot be read"):
            decode(data, LIMITS)


def test_an_animated_gif_with_a_loop_and_a_comment_tells_its_size():
    frames = [picture(300, 200) for _ in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0, comment=b"x" * 700, duration=50)
    assert header_pixels(data) == 60_000


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x112, 3, 1, 6, 0)
EXIF_SEGMENT = b"\xff\xe1" + struct.pack(">H", len(EXIF) + 2) + EXIF
MUCH = 16_000_000  # bytes


def box(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", 8 + len(contents)) + kind + contents


def much_of(kind: str) -> bytes:
    """A file of 600x200 pixels and MUCH bytes, most of which nobody needs to know its size."""
    image = Pillow.new("L", (600, 200))
    data = encoded(image, kind)
    match kind:
        case "JPEG":
            return data[:-2] + b"\xff\0" * (MUCH // 2) + data[-2:]
        case "PNG":
            return data[:-12] + png_chunk(b"IDAT", bytes(MUCH)) + data[-12:]
        case "WEBP":
            chunks = data[12:] + webp_chunk(b"XMP ", bytes(MUCH))
            return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
        case "TIFF":  # its sizes are said to be lists, in each of many entries
            values, entries = 100_000, 500
            tags = [(256 + number % 2, 4, values, 8 + 4 * number) for number in range(entries)]
            directory = 8 + 4 * (values + entries)
            listed = struct.pack("<II", 600, 200) * ((values + entries) // 2)
            told = struct.pack("<H", entries) + b"".join(struct.pack("<HHII", *each) for each in tags) + bytes(4)
            return b"II*\0" + struct.pack("<I", directory) + listed + told + bytes(MUCH)
        case "AVIF":
            return data + box(b"moov", bytes(MUCH))
    return data + bytes(MUCH)


def resident(file: Path) -> int:
    """Return how many bytes of the file are mapped into this process's memory."""
    maps = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
    return sum(
        1024 * int(found) for found in re.findall(rf"{re.escape(str(file))}\n.*?^Rss: +(\d+) kB", maps, re.S | re.M)
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"])
def test_size_and_turn_are_read_without_the_pixels(tmp_path, kind):
    """The event loop reads them, so neither time nor memory may grow with the file."""
    path = tmp_path / kind
    path.write_bytes(much_of(kind))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert len(data) > MUCH
        tracemalloc.start()
        try:
            assert upright_size(data) == (600, 200)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert 0 < resident(path) < MUCH / 2  # the kernel maps up to 2 MiB around each byte that is read
        assert peak < 200_000


def test_exif_behind_the_first_scan_of_a_jpeg_turns_nothing():
    data = encoded(picture(60, 40), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", scan + 2)
    early, late = (data[:at] + EXIF_SEGMENT + data[at:] for at in (scan, second))
    for file, size in [(early, (40, 60)), (late, (60, 40))]:
        decoded = decode(file, LIMITS)
        assert upright_size(file) == (decoded.width, decoded.height) == size


def test_a_stray_byte_between_a_jpegs_segments_hides_no_size():
    data = encoded(picture(300, 900), "JPEG")
    at = data.index(b"\xff\xdb")
    stray = data[:at] + b"\0" + data[at:]
    decoded = decode(stray, LIMITS)
    assert header_size(stray) == upright_size(stray) == (decoded.width, decoded.height) == (300, 900)


def test_a_frame_header_that_is_too_short_is_the_jpegs_only_one():
    data = encoded(picture(300, 200), "JPEG")
    at = data.index(b"\xff\xc0")
    two = data[:at] + b"\xff\xc0\0\3\x08" + data[at:]
    assert header_size(two) is None
    with pytest.raises(InvalidImage, match="two frame headers"):
        structure_of(two)


def turned(kind: str) -> bytes:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    options = {"tiffinfo": {274: 6}} if kind == "TIFF" else {"exif": exif}
    return encoded(Pillow.new("RGB", (8, 24)), kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_below_is_read_whole(kind):
    found = structure_of(turned(kind))
    assert found is not None
    assert (found.width, found.height) == (8, 24)
    assert found.orientation == (1 if kind in ("GIF", "BMP") else 6)


@given(st.sampled_from(KINDS), st.data())
def test_what_is_decoded_is_as_large_and_turned_as_its_header_says(kind, data):
    whole = bytearray(turned(kind))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(whole), 600)))
        whole[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
    try:
        found = structure_of(bytes(whole))
    except InvalidImage:
        return
    if found is None:
        assert upright_size(bytes(whole)) == (0, 0)
        return
    size = found.width, found.height
    assert header_size(bytes(whole)) == size
    assert orientation_of(bytes(whole)) == found.orientation
    assert upright_size(bytes(whole)) == (size[::-1] if found.orientation in SIDEWAYS else size)


def test_an_item_without_an_entry_does_no_harm():
    boxes = box(b"meta", bytes(4) + box(b"iinf", bytes(6) + box(b"infe", b"")))
    assert header_size(box(b"ftyp", b"avif" + bytes(4)) + boxes) is None
