import contextlib
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms, ImageFilter

from service.core.errors import InvalidImage, NotFound, TooLarge
from service.media.decoder import Image, ImageLimits, ImageReader, ImageStore, decode, header_pixels
from service.settings import IMAGE_ENTRY_BYTES

LIMITS = ImageLimits(max_bytes=2_000_000, max_pixels=4_000_000)
RNG = np.random.default_rng(0)


def picture(width: int = 224, height: int = 224) -> Pillow.Image:
    """Smooth colours, brighter to the right, so that a turned picture is another one."""
    noise = RNG.integers(0, 255, (8, 8, 3), np.uint8)
    smooth = Pillow.fromarray(noise).resize((width, height), Pillow.Resampling.BICUBIC)
    ramp = np.linspace(0, 1, width)[None, :, None]
    return Pillow.fromarray((np.asarray(smooth) * ramp).astype(np.uint8))


def encoded(image: Pillow.Image, kind: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seen(data: bytes) -> np.ndarray:
    """[224, 224, 3] of what the encoder gets."""
    pixels = decode(data, LIMITS).pixels
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels.transpose(1, 2, 0)


def apart(one: np.ndarray, other: Pillow.Image | np.ndarray) -> float:
    return float(np.abs(one.astype(int) - np.asarray(other).astype(int)).mean())


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_picture_of_the_encoders_size_passes_through_untouched(kind, options):
    image = picture()
    assert np.array_equal(seen(encoded(image, kind, **options)), np.asarray(image))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("GIF", {})])
def test_lossy_formats_come_out_close(kind, options):
    image = picture()
    assert apart(seen(encoded(image, kind, **options)), image) < 12


def test_other_sizes_are_squashed_with_pillows_bicubic_filter():
    image = picture(640, 300)
    decoded = decode(encoded(image), LIMITS)
    assert np.array_equal(
        decoded.pixels.transpose(1, 2, 0), np.asarray(image.resize((224, 224), Pillow.Resampling.BICUBIC))
    )
    assert (decoded.width, decoded.height) == (640, 300)


def test_a_large_jpeg_is_drafted_and_stays_close_to_the_full_decode():
    image = picture(1600, 1200)
    data = encoded(image, "JPEG", quality=90)
    full = Pillow.open(BytesIO(data)).resize((224, 224), Pillow.Resampling.BICUBIC)
    assert apart(seen(data), full) < 1.0
    assert decode(data, LIMITS).width == 1600


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = picture().convert("L")
    if mode == "I;16":
        data = encoded(Pillow.fromarray(np.asarray(grey).astype(np.uint16) << 8))
    else:
        source = grey if mode in ("L", "1", "LA") else picture()
        data = encoded(source.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert seen(data).std() > 5


@pytest.mark.parametrize(
    ("kind", "size"),
    [("PNG", (500, 300)), ("JPEG", (500, 300)), ("JPEG", (1900, 1000)), ("JPEG", (2000, 1900)), ("WEBP", (30, 20))],
)
def test_a_view_is_the_same_whatever_other_views_are_decoded_with_it(kind, size):
    data = encoded(picture(*size), kind)
    both = decode(data, LIMITS, (448, 224))
    assert (both.pixels == decode(data, LIMITS).pixels).all()
    assert (both.views[448] == decode(data, LIMITS, (448,)).views[448]).all()
    assert both.views[448].shape == (3, 448, 448)


def test_the_crops_are_the_quarters_of_the_closer_view():
    decoded = decode(encoded(picture(448, 448), "PNG"), LIMITS, (448,))
    whole, crops = decoded.views[448], decoded.crops
    for crop, (top, left) in zip(crops, [(0, 0), (0, 224), (224, 0), (224, 224)], strict=True):
        assert (crop == whole[:, top : top + 224, left : left + 224]).all()


@pytest.mark.parametrize(("size", "larger"), [((224, 224), False), ((225, 10), True), ((10, 225), True)])
def test_an_image_tells_whether_it_has_more_pixels_than_are_seen(size, larger):
    assert Image.of(encoded(picture(*size), "PNG")).larger_than(224) is larger
    assert Image.of(b"\xff\xd8").larger_than(224)  # may be


def test_sixteen_bit_grey_keeps_its_upper_eight_bits():
    grey = np.asarray(picture().convert("L"))
    data = encoded(Pillow.fromarray((grey.astype(np.uint16) << 8) + 200))
    assert np.array_equal(seen(data), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode):
    clear = Pillow.new("RGBA", (100, 80), (10, 20, 30, 0))
    image = clear.convert("LA") if mode == "LA" else clear
    data = encoded(image, "GIF") if mode == "P" else encoded(image)
    assert seen(data).min() == 255


def test_half_transparent_black_is_grey():
    assert seen(encoded(Pillow.new("RGBA", (300, 300), (0, 0, 0, 128))))[5, 5].tolist() == [127, 127, 127]


def test_a_transparent_colour_of_a_plain_png_is_transparent():
    assert seen(encoded(Pillow.new("RGB", (50, 50), (1, 2, 3)), transparency=(1, 2, 3))).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = picture(400, 300)
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # the transpose that brings an upright picture to this orientation
    stored = upright.transpose(Pillow.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encoded(stored, kind, exif=exif, **options), LIMITS)
    assert apart(decoded.pixels.transpose(1, 2, 0), upright.resize((224, 224), Pillow.Resampling.BICUBIC)) < 3
    assert (decoded.width, decoded.height) == (400, 300)


def test_broken_exif_beside_good_pixels_is_no_orientation():
    image = picture()
    data = encoded(image, "WEBP", lossless=True, exif=b"Exif\0\0not a tiff header at all")
    assert np.array_equal(seen(data), np.asarray(image))


def test_an_animated_gif_is_its_first_frame():
    red, blue = Pillow.new("RGB", (60, 60), (255, 0, 0)), Pillow.new("RGB", (60, 60), (0, 0, 255))
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert seen(data)[100, 100].tolist() == [255, 0, 0]


def test_a_colour_profile_does_no_harm():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = picture()
    assert np.array_equal(seen(encoded(image, icc_profile=profile)), np.asarray(image))


def test_one_pixel_is_an_image():
    assert seen(encoded(Pillow.new("RGB", (1, 1), (9, 8, 7))))[0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "start with 68 65 6c 6c 6f; send PNG, JPEG, WebP or GIF"),
        (b"<!DOCTYPE html><html>", "looks like an HTML page"),
        (b'  <svg xmlns="">', "looks like SVG"),
        (b"%PDF-1.7", "looks like PDF"),
        (b"\0\0\0\x18ftypheic....", "looks like HEIC"),
        (encoded(picture(), "TIFF"), "looks like TIFF"),
        (encoded(picture(), "BMP"), "looks like BMP"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image"),
    ],
)
def test_what_is_no_image_says_what_to_send(data, message):
    with pytest.raises(InvalidImage, match=message):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_is_refused(kind, share):
    data = encoded(picture().filter(ImageFilter.DETAIL), kind)
    with pytest.raises(InvalidImage, match="send"):
        decode(data[: int(len(data) * share)], LIMITS)


def test_too_many_bytes_are_refused_before_a_look_at_them():
    with pytest.raises(TooLarge, match="2,000,001 bytes, the limit is 2,000,000"):
        decode(bytes(2_000_001), LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_too_many_pixels_are_refused_by_the_header_alone(kind):
    data = encoded(Pillow.new("L", (4001, 1000)), kind)
    with pytest.raises(TooLarge, match=r"4001x1000 pixels \(4\.0 megapixels\), the limit is 4\.0"):
        decode(data[: len(data) // 2 if kind != "WEBP" else None], LIMITS)  # the pixels are not even there


def test_a_bomb_is_refused_without_a_warning():
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0"
    with pytest.raises(TooLarge, match="65536x65536"):
        decode(header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e", LIMITS)


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_are_refused_and_nothing_else(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidImage, TooLarge):
        decode(bytes(whole), LIMITS)


WHOLE = [encoded(picture(40, 30), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]


async def test_the_reader_decodes_and_names_images_off_the_loop():
    reader = ImageReader(LIMITS, threads=1)
    small, large = encoded(picture()), bytes(1_500_000)
    try:
        assert (await reader.decode(small)).pixels.shape == (3, 224, 224)
        assert await reader.identify(small) == Image.of(small)
        assert (await reader.identify(large)).digest == Image.of(large).digest
    finally:
        reader.close()


def test_an_image_is_named_by_its_bytes():
    image = Image.of(b"x")
    assert image.id == f"img_{image.digest[:32]}"
    assert Image.of(b"y").id != image.id


def test_the_store_forgets_the_least_recently_used_first():
    store = ImageStore(max_bytes=3 * (10 + IMAGE_ENTRY_BYTES), ttl_s=100)
    a, b, c = (Image.of(letter * 10) for letter in (b"a", b"b", b"c"))
    for image in (a, b, c):
        store.put(image, now=0)
    store.get(a.id, now=1)
    store.put(Image.of(b"d" * 10), now=2)
    assert store.get(a.id, now=3) is a
    assert store.nbytes == store.max_bytes
    with pytest.raises(NotFound, match="POST /v1/images"):
        store.get(b.id, now=3)


def test_the_store_forgets_when_the_time_is_over_and_a_second_upload_renews_it():
    store = ImageStore(max_bytes=10_000, ttl_s=100)
    image = Image.of(b"a")
    assert store.put(image, now=0) == 100
    assert store.put(image, now=50) == 150
    assert store.get(image.id, now=149) is image
    with pytest.raises(NotFound, match="its time is over"):
        store.get(image.id, now=150)
    assert (len(store), store.nbytes) == (0, 0)


def test_the_store_is_bounded_for_tiny_images_and_lets_expired_ones_go():
    store = ImageStore(max_bytes=100_000, ttl_s=100)
    for number in range(1000):
        store.put(Image.of(b"%d" % number), now=0)
    assert len(store) < 100
    store.put(Image.of(b"later"), now=100)
    assert (len(store), store.nbytes) == (1, 5 + IMAGE_ENTRY_BYTES)


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


@given(st.sampled_from(["PNG", "GIF", "JPEG", "WEBP"]), st.integers(0, 60), st.binary(max_size=60))
def test_headers_that_are_cut_or_wrong_do_no_harm(kind, kept, rest):
    pixels = header_pixels(encoded(Pillow.new("RGB", (8, 8)), kind)[:kept] + rest)
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
        (GIF[:6] + b"\1\0\1\0" + GIF[10:25] + b"!\xfe\1x\0" * 300 + GIF[25:], None),
        (JPEG[:2] + b"\xff\xfe\0\2" * 600 + JPEG[2:], None),
        (PNG[:8] + png_chunk(b"tEXt", b"\0\0\0\1\0\0\0\1") + PNG[8:], None),
        (PNG[:8] + SMALL_IHDR + PNG[8:], 1),
    ],
)
def test_a_header_cannot_tell_less_than_is_decoded(data, told):
    """The whole size, or None for the most that is allowed; what tells two sizes is not decoded."""
    assert header_pixels(data) == told
    if told == 1:
        with pytest.raises(InvalidImage, match="tells two sizes, 1 pixels first and then 1500x1000"):
            decode(data, LIMITS)
    else:
        assert decode(data, LIMITS).width == 1500


def test_an_animated_gif_with_a_loop_and_a_comment_tells_its_size():
    frames = [picture(300, 200) for _ in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0, comment=b"x" * 700, duration=50)
    assert header_pixels(data) == 60_000
