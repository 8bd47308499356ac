"""Formats beyond those of the web: AVIF, HEIC, TIFF and BMP decode to the right pixels, and their walks have bounds."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from service.core.errors import GlimpseError, InvalidImage, TooLarge
from service.core.viewport import Viewport
from service.media import decoder
from service.media.decoder import ImageLimits, decode
from service.media.formats import FORMATS, NAMES, format_of
from service.media.header import header_size, upright_size
from service.media.structure import structure_of
from service.media.workers import DecodingWorkers
from tests.support.pictures import LIMITS, encoded, picture

HEIC = Path(__file__).parent / "heic"  # a red picture of 96x64, its top left quarter is blue
PLAIN = (HEIC / "plain.heic").read_bytes()
BLUE, RED, WHITE = (20, 60, 220), (200, 30, 40), (255, 255, 255)
PHOTO = picture(300, 200)
GREY = PHOTO.convert("L")


def apart(data: bytes, expected: Pillow.Image) -> float:
    expected = expected.convert("RGB").resize((224, 224), Pillow.Resampling.BICUBIC)
    decoded = decode(data, LIMITS)
    assert (decoded.width, decoded.height) == header_size(data) == (300, 200)
    return float(np.abs(decoded.pixels.transpose(1, 2, 0).astype(int) - np.asarray(expected).astype(int)).mean())


def corners(data: bytes) -> list[tuple[int, ...]]:
    """The colours at top left, top right, bottom left and bottom right."""
    pixels = decode(data, LIMITS).pixels
    return [tuple(pixels[:, y, x].tolist()) for y in (20, 200) for x in (20, 200)]


def near(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 6


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "P"])
def test_a_tiff_is_exact(mode, compression):
    image = PHOTO.convert(mode)
    assert apart(encoded(image, "TIFF", compression=compression), image) < 0.6  # resizing a palette's or CMYK's values


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_a_scan_of_a_page_is_read(compression):
    page = PHOTO.convert("1")
    assert apart(encoded(page, "TIFF", compression=compression), page.convert("RGB")) < 1


def test_a_tiff_of_sixteen_bits_keeps_its_upper_eight():
    deep = Pillow.fromarray((np.asarray(GREY).astype(np.uint16) << 8) + 200)
    assert apart(encoded(deep, "TIFF"), GREY) < 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("white", [0, 1])
def test_grey_is_read_either_way_round(order, bits, white):
    """WhiteIsZero (0), as radiographs have it, and BlackIsZero; in both orders of bytes."""
    grey = np.asarray(GREY).astype(np.uint16) << bits - 8
    stored = grey if white else (1 << bits) - 1 - grey
    pixels = stored.astype(f"{order}u{bits // 8}").tobytes()
    tags = [(256, GREY.width), (257, GREY.height), (258, bits), (259, 1), (262, white), (273, 8), (277, 1),
            (278, GREY.height), (279, len(pixels))]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    data = head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    assert apart(data, GREY) < 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_bmp_is_exact(mode):
    image = PHOTO.convert(mode)
    assert apart(encoded(image, "BMP"), image.convert("RGB")) < 0.6


def test_a_bmp_that_begins_at_the_top_is_upright():
    data = encoded(PHOTO, "BMP")
    rows = [data[54 + 900 * row : 54 + 900 * (row + 1)] for row in range(200)]
    turned = data[:22] + struct.pack("<i", -200) + data[26:54] + b"".join(reversed(rows))
    assert apart(turned, PHOTO) < 0.1


def test_an_avif_comes_out_close_alone_with_transparency_and_as_a_film():
    assert apart(encoded(PHOTO, "AVIF", quality=90), PHOTO) < 2
    assert apart(encoded(PHOTO, "AVIF", quality=90, save_all=True, append_images=[PHOTO.rotate(180)]), PHOTO) < 2
    clear = PHOTO.convert("RGBA")
    clear.putalpha(0)
    assert decode(encoded(clear, "AVIF", quality=90), LIMITS).pixels.min() > 250


def test_a_heic_comes_out_close_alone_and_with_transparency():
    assert all(map(near, corners(PLAIN), (BLUE, RED, RED, RED)))
    assert all(map(near, corners((HEIC / "clear.heic").read_bytes()), (BLUE, RED, RED, WHITE)))


@pytest.mark.parametrize(
    ("turn", "size", "places"),
    [
        (0, (96, 64), (BLUE, RED, RED, RED)),
        (1, (64, 96), (RED, RED, BLUE, RED)),
        (2, (96, 64), (RED, RED, RED, BLUE)),
        (3, (64, 96), (RED, BLUE, RED, RED)),
    ],
)
def test_a_heic_is_turned_once(turn, size, places):
    """Its decoder turns it; `turn` counts quarters to the left."""
    at = PLAIN.index(b"colr")
    data = PLAIN[:at] + b"irot" + bytes([turn]) + PLAIN[at + 5 :]
    decoded = decode(data, LIMITS)
    assert (decoded.width, decoded.height) == size
    assert all(map(near, corners(data), places))


def cut(width: int, height: int, parts: int, left: int) -> bytes:
    """The plain HEIC, cut to `width` and `height` of so many parts of a pixel, `left` pixels left of the middle."""
    at, more = PLAIN.index(b"colr") - 4, 40 - 19
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", width, parts, height, parts, -left, 1, 0, 1)
    data = bytearray(PLAIN[:at] + clap + PLAIN[at + 19 :])
    places = [data.index(kind) - 4 for kind in (b"meta", b"iprp", b"ipco")]
    places.append(data.index(struct.pack(">I", PLAIN.index(b"mdat") + 4)))  # the picture's offset
    for place in places:
        data[place : place + 4] = struct.pack(">I", int.from_bytes(data[place : place + 4], "big") + more)
    return bytes(data)


@pytest.mark.parametrize(
    ("aperture", "size", "places"),
    [
        ((48, 64, 1, 24), (48, 64), (BLUE, BLUE, RED, RED)),
        ((96, 32, 1, 0), (96, 32), (BLUE, RED, RED, RED)),
        ((191, 63, 2, 0), (96, 32), (BLUE, RED, RED, RED)),
    ],
)
def test_a_heic_is_as_large_as_what_its_decoder_leaves_of_it(aperture, size, places):
    data = cut(*aperture)
    decoded = decode(data, LIMITS)
    assert upright_size(data) == (decoded.width, decoded.height) == size
    assert all(map(near, corners(data), places))
    padded = decode(data, LIMITS, viewport=Viewport.around(*size, WHITE)).pixels.transpose(1, 2, 0)
    shown = (padded.astype(int).sum(axis=2) < 600).nonzero()
    assert [np.ptp(along) + 1 for along in shown] == [round(224 * side / max(size)) for side in reversed(size)]


def test_a_heic_of_which_little_is_shown_is_refused():
    """Else the limit of pixels would not hold for what is decoded."""
    data = cut(1, 1, 1, 0).replace(struct.pack(">II", 96, 64), struct.pack(">II", 9600, 6400))
    with pytest.raises(InvalidImage, match="codes many more pixels than it shows"):
        decode(data, LIMITS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_an_orientation_is_applied_once(orientation, kind):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = PHOTO.transpose(Pillow.Transpose(undo[orientation])) if orientation > 1 else PHOTO
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, "quality": 90} if kind == "AVIF" else {"tiffinfo": {274: orientation}}
    data = encoded(stored, kind, **options)
    decoded = decode(data, LIMITS)
    expected = np.asarray(PHOTO.resize((224, 224), Pillow.Resampling.BICUBIC)).astype(int)
    assert np.abs(decoded.pixels.transpose(1, 2, 0).astype(int) - expected).mean() < 3
    assert (decoded.width, decoded.height) == (300, 200)


def tiled(side: int = 64) -> bytes:
    """A grey TIFF of 300x200 in tiles."""
    grey = np.zeros((-(-200 // side) * side, -(-300 // side) * side), np.uint8)
    grey[:200, :300] = np.asarray(GREY)
    tiles = [
        grey[y : y + side, x : x + side].tobytes()
        for y in range(0, grey.shape[0], side)
        for x in range(0, grey.shape[1], side)
    ]
    places = [8 + side * side * number for number in range(len(tiles))]
    end = 8 + side * side * len(tiles)
    tags = [(256, 3, 1, 300), (257, 3, 1, 200), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [
        (322, 3, 1, side),
        (323, 3, 1, side),
        (324, 4, len(tiles), end),
        (325, 4, len(tiles), end + 4 * len(tiles)),
    ]
    directory = end + 8 * len(tiles)
    sizes = [side * side] * len(tiles)
    return b"".join([
        b"II*\0" + struct.pack("<I", directory), *tiles, struct.pack(f"<{2 * len(tiles)}I", *places, *sizes),
        struct.pack("<H", len(tags)), *(struct.pack("<HHII", *tag) for tag in tags), bytes(4),
    ])  # fmt: skip


def test_a_tiff_in_tiles_is_read():
    assert apart(tiled(), GREY) < 0.6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(PHOTO, "TIFF", compression="jpeg"), "compressed with JPEG, which is not read: save it as PNG"),
        (encoded(PHOTO, "TIFF", compression="zstd"), "compressed with zstd"),
        (encoded(PHOTO.convert("F"), "TIFF"), "samples of a rare kind"),
        (encoded(PHOTO, "TIFF", tiffinfo={254: 1}), "a camera's raw image"),
        (b"II+\0" + bytes(60), "a BigTIFF"),
        (encoded(PHOTO, "BMP")[:30] + b"\1\0\0\0" + bytes(400), "the BMP is compressed"),
        (encoded(PHOTO, "AVIF").replace(b"av01", b"jpeg"), "no still picture of AV1 or HEVC"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no still picture"),
        (b"\0\0\0\x18ftypavis\0\0\0\0avisiso8", "no still picture"),
    ],
)
def test_a_kind_that_is_not_read_is_named(data, message):
    with pytest.raises(InvalidImage, match=message):
        decode(data, LIMITS)


def test_a_heic_needs_its_plugin(monkeypatch):
    monkeypatch.setattr(decoder, "pi_heif", None)
    with pytest.raises(InvalidImage, match="this server has no decoder for it: send PNG, JPEG"):
        decode(PLAIN, LIMITS)


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "BMP", "HEIC"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_refused(kind, share):
    data = PLAIN if kind == "HEIC" else encoded(PHOTO, kind)
    with pytest.raises(InvalidImage, match=r"send|save"):
        decode(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "AVIF"])
def test_too_many_pixels_are_refused_by_the_header_alone(kind):
    data = encoded(Pillow.new("L", (4001, 1000)), kind)
    with pytest.raises(TooLarge, match=r"4001x1000 pixels"):
        decode(data, ImageLimits(max_bytes=20_000_000, max_pixels=4_000_000))


def test_a_tiff_is_rebuilt_from_its_picture_alone():
    data = encoded(PHOTO, "TIFF", compression="tiff_lzw", description="hidden words", software="hidden words")
    second = encoded(PHOTO, "TIFF", save_all=True, append_images=[PHOTO] * 5)
    found, first = structure_of(data), structure_of(second)
    assert found is not None
    assert first is not None
    assert b"hidden" not in found.data
    assert len(first.data) < len(second) / 5


async def test_a_picture_that_is_coded_larger_than_it_says_ends_within_the_limits():
    """The decoder believes the coded picture of 100 megapixels, and its process has limits."""
    lies = encoded(Pillow.new("L", (8000, 8000), 9), "AVIF", speed=10).replace(
        struct.pack(">II", 8000, 8000), struct.pack(">II", 64, 64)
    )
    workers = DecodingWorkers(ImageLimits(), 1, cpu_s=2.0, memory_bytes=64_000_000)
    try:
        with pytest.raises(GlimpseError, match=r"memory|CPU|damaged"):
            await workers.decode(lies, (224,))
    finally:
        workers.close()


def test_the_list_of_formats_is_the_one_that_is_told():
    assert NAMES == "PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP"
    for each in FORMATS:
        data = PLAIN if each.name == "HEIC" else encoded(PHOTO, each.pillow)
        assert format_of(data) == each


def test_the_files_that_are_damaged_below_decode_whole():
    for data in WHOLE:
        assert decode(data, LIMITS).pixels.shape == (3, 224, 224)


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_are_refused_and_nothing_else(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, min(len(whole), 600) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidImage, TooLarge):
        decode(bytes(whole), LIMITS)


SMALL = picture(40, 30)
WHOLE = [
    *(encoded(SMALL, kind) for kind in ("AVIF", "TIFF", "BMP")),
    *(encoded(SMALL, "TIFF", compression=each) for each in ("tiff_lzw", "tiff_adobe_deflate", "packbits")),
    tiled(),
    PLAIN,
]
