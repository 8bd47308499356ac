"""Mutated images: each one is made again from its seed and number, and they reach every decoder."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from random import Random

import pytest
from PIL import Image, UnidentifiedImageError

from benchmarks.fuzz import images
from benchmarks.fuzz.parts import format_of, mended, parts_of
from benchmarks.fuzz.pictures import files, noise
from service.core.errors import InvalidImage, TooLarge
from service.media.decoder import ImageLimits, decode

LIMITS = ImageLimits()
ACCEPTED = [name for name in files() if not name.startswith("other")]


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_file_to_start_from_is_decoded(name):
    assert decode(files()[name], LIMITS).pixels.shape == (3, 224, 224)


@pytest.mark.parametrize("name", [name for name in files() if name.startswith("other")])
def test_files_of_other_formats_are_refused(name):
    with pytest.raises(InvalidImage):
        decode(files()[name], LIMITS)


def test_the_interlaced_file_has_the_pixels_that_were_written():
    with Image.open(BytesIO(files()["PNG interlaced"])) as picture:
        assert picture.info["interlace"] == 1
        assert (noise(33, 21, 7) == picture).all()


@pytest.mark.parametrize("name", files())
def test_the_parts_joined_are_the_file(name):
    data = files()[name]
    assert b"".join(parts_of(data)) == data
    assert len(parts_of(data)) >= 2


def test_parts_are_those_of_the_format():
    assert [part[4:8] for part in parts_of(files()["PNG palette"])][1:] == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert [part[1] for part in parts_of(files()["JPEG grey"])] == [0xD8, 0xE0, 0xDB, 0xC0, 0xC4, 0xC4, 0xDA, 0xD9]
    assert [part[:4] for part in parts_of(files()["WEBP exif"])][1:] == [b"VP8X", b"ICCP", b"VP8 ", b"EXIF", b"XMP "]
    assert [part[:1] for part in parts_of(files()["GIF clear"])][1:] == [b"!", b"!", b",", b";"]


@pytest.mark.parametrize("mutation", tuple(dict.fromkeys(images.MUTATIONS)), ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM"])
def test_a_mutation_takes_any_bytes(mutation, data):
    for seed in range(20):
        assert isinstance(mutation(Random(seed), data), bytes)


@pytest.mark.parametrize("name", ["JPEG progressive", "PNG palette", "WEBP exif", "GIF animated"])
@pytest.mark.parametrize("mutation", tuple(dict.fromkeys(images.MUTATIONS)), ids=lambda mutation: mutation.__name__)
def test_a_mutation_changes_a_file(mutation, name):
    assert any(mutation(Random(seed), files()[name]) != files()[name] for seed in range(10))


def test_a_checksum_and_a_length_are_mended():
    png = bytearray(files()["PNG colours"])
    png[23] ^= 1  # its height
    with pytest.raises(UnidentifiedImageError):
        Image.open(BytesIO(png))
    with Image.open(BytesIO(mended(bytes(png)))) as picture:
        assert picture.size == (96, 65)
    webp = files()["WEBP lossy"] + bytes(100)
    assert int.from_bytes(mended(webp)[4:8], "little") == len(webp) - 8


def test_a_number_and_a_seed_make_the_same_image_again():
    assert [images.mutant(7, number) for number in range(50)] == [images.mutant(7, number) for number in range(50)]
    assert len({images.image(seed, 1)[0] for seed in range(20)}) > 15


def test_every_format_is_reached_and_many_mutants_are_still_pictures():
    """Otherwise a campaign tests the first checks only."""
    found = Counter()
    for number in range(400):
        data, _ = images.image(1, number)
        try:
            decode(data, LIMITS)
            found[format_of(data), "decoded"] += 1
        except InvalidImage as error:
            found[format_of(data), "damaged" if error.__cause__ is not None else "refused"] += 1
        except TooLarge:
            found[format_of(data), "too large"] += 1
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        assert found[kind, "decoded"] >= 10, found
        assert found[kind, "damaged"] >= 5, found  # by its decoder, after the walk over its parts
