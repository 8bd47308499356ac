import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from benchmarks.bombs import BOMBS
from service.core.errors import InvalidImage
from service.media.decoder import decode
from service.media.header import header_size
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


@given(
    st.sampled_from(["PNG", "GIF", "JPEG", "WEBP", "AVIF", "TIFF", "BMP"]), st.integers(0, 200), st.binary(max_size=60)
)
def test_headers_that_are_cut_or_wrong_do_no_harm(kind, kept, rest):
    pixels = header_pixels(encoded(Pillow.new("RGB", (8, 8)), kind)[:kept] + rest)
    assert pixels is None or pixels >= 0


@pytest.mark.parametrize("name", BOMBS)
def test_a_bombs_header_is_read_or_not_and_does_not_fail(name):
    pixels = header_pixels(BOMBS[name]())
    assert pixels is None or pixels >= 0


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
