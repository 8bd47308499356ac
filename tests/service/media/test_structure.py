"""The parts of a file are counted before a decoder sees it, so hostile files cost microseconds."""

from __future__ import annotations

import struct
import time
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from benchmarks import bombs
from benchmarks.bombs import BOMBS, png_chunk, webp_chunk
from service.core.errors import InvalidImage, TooLarge
from service.media.decoder import ImageLimits, decode
from service.media.exif import exif_orientation
from service.media.structure import structure_of
from tests.support.pictures import encoded, picture

SERVED = ImageLimits()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_a_reason_and_before_a_decoder_sees_it(name):
    data = BOMBS[name]()
    assert len(data) <= SERVED.max_bytes
    before = time.process_time()
    with pytest.raises((InvalidImage, TooLarge), match=r"more than|limit of a side|cut short|share|larger") as caught:
        decode(data, SERVED)
    assert time.process_time() - before < 1
    assert "send" in caught.value.message or "save it" in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        bombs.jpeg(b"\xff" * 300 + (b"\xff\xfe\xff\xff" + bytes(65533)) * 10),
        bombs.jpeg((b"\xff\xe2\xff\xff" + bytes(65533)) * 100),
        encoded(picture(64, 64), "JPEG", progressive=True),
        bombs.scans(500, 500, 20),
        bombs.gif(b"!\xfe" + (b"\xff" + bytes(255)) * 1000 + b"\0"),
        bombs.png(64, 64, before=png_chunk(b"tEXt", b"a\0b") * 1000 + png_chunk(b"iTXt", bytes(5_000_000))),
        bombs.png(65_535, 3, depth=8, colours=2),
        bombs.png(3, 65_535, depth=8, colours=2),
        bombs.webp(webp_chunk(b"abcd") * 1000 + webp_chunk(b"XMP ", bytes(5_000_001))),
    ],
)
def test_large_metadata_that_programs_write_does_no_harm(data):
    assert decode(data, SERVED).pixels.shape == (3, 224, 224)


def test_what_follows_a_jpeg_is_not_counted():
    """A phone puts a video, or more pictures, behind the picture."""
    data = bombs.jpeg()
    found = structure_of(data + bombs.scans(500, 500, 1000) + b"\0\0\0\x18ftypmp42")
    assert found is not None
    assert (found.scans, found.width) == (1, 64)
    assert found.data.endswith(data[-100:])


@pytest.mark.parametrize(
    "data",
    [
        bombs.jpeg(b"\xff\xe1\0\x10Exif\0\0" + bytes(8) + b"\xff\xfe\0\6abcd"),
        encoded(picture(64, 64), "GIF", comment=b"abcd"),
        bombs.png(64, 64, before=png_chunk(b"tEXt", b"a\0b"), after=png_chunk(b"tEXt", b"a\0b")),
        bombs.webp(webp_chunk(b"XMP ", b"abcd")),
    ],
)
def test_a_decoder_gets_the_pixels_alone(data):
    found = structure_of(data)
    assert found is not None
    for metadata in (b"Exif", b"abcd", b"a\0b", b"tEXt", b"XMP "):
        assert metadata not in found.data
    with Pillow.open(BytesIO(data)) as whole, Pillow.open(BytesIO(found.data)) as lean:
        assert np.array_equal(np.asarray(whole.convert("RGB")), np.asarray(lean.convert("RGB")))


def test_colours_do_not_change_without_the_metadata():
    """Adobe's segment says that CMYK is inverted; a GIF's control block says what is transparent."""
    for kind, image in (("JPEG", picture().convert("CMYK")), ("GIF", Pillow.new("RGBA", (9, 9), (10, 20, 30, 0)))):
        data = encoded(image, kind)
        found = structure_of(data)
        with Pillow.open(BytesIO(data)) as whole, Pillow.open(BytesIO(found.data)) as lean:
            assert np.array_equal(np.asarray(whole.convert("RGBA")), np.asarray(lean.convert("RGBA")))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_behind_the_pixels_of_a_png_turns_it(orientation):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    early = encoded(picture(60, 40), exif=exif)
    start = early.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(early[start : start + 4], "big")
    late = early[:start] + early[end:-12] + early[start:end] + early[-12:]
    one, other = decode(early, SERVED), decode(late, SERVED)
    assert (one.pixels == other.pixels).all()
    assert (other.width, other.height) == ((40, 60) if orientation in (6, 8) else (60, 40))


def tag(number: int, kind: int, count: int, value: int, order: str = ">") -> bytes:
    return struct.pack(f"{order}HHII", number, kind, count, value << 16 if order == ">" and kind == 3 else value)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"Exif\0\0MM\0*\0\0\0\x08\0\1" + tag(0x112, 3, 1, 6), 6),
        (b"II*\0\x08\0\0\0\1\0" + tag(0x112, 3, 1, 8, "<"), 8),
        (b"MM\0*\0\0\0\x08\0\2" + tag(0x10F, 2, 9, 0) + tag(0x112, 4, 1, 3), 3),
        (b"MM\0*\0\0\0\x08\0\1" + tag(0x112, 3, 1, 9), 1),
        (b"MM\0*\0\0\0\x08\xff\xff" + tag(0x111, 3, 1, 6) * 600 + tag(0x112, 3, 1, 6), 1),
        (b"MM\0*\xff\xff\xff\xff", 1),
        (b"MM", 1),
        (b"", 1),
    ],
)
def test_orientation_is_read_from_the_first_directory(exif, orientation):
    assert exif_orientation(exif) == orientation


def test_exif_whose_tags_all_point_at_all_of_it_takes_no_memory():
    """Pillow copies what each tag points at: 5,000 tags of 64 KB are 300 MB."""
    tags = b"".join(tag(number, 1, 60_000, 0) for number in range(0x113, 0x113 + 5000))
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + tags
    before = time.process_time()
    assert decode(bombs.jpeg(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif), SERVED).width == 64
    assert time.process_time() - before < 1


@given(st.sampled_from(["PNG", "GIF", "JPEG", "WEBP"]), st.integers(0, 200), st.binary(max_size=60))
def test_files_that_are_cut_or_wrong_are_walked_or_refused(kind, kept, rest):
    try:
        found = structure_of(encoded(Pillow.new("RGB", (8, 8)), kind)[:kept] + rest)
    except InvalidImage:
        return
    assert found is None or found.width * found.height > 0
