import contextlib
import struct
import zlib
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms, ImageFilter

from benchmarks.bombs import png_chunk
from service.core.errors import InvalidImage, TooLarge
from service.core.viewport import Viewport
from service.media.decoder import decode
from service.media.header import upright_size
from tests.support.pictures import LIMITS, encoded, picture


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


@pytest.mark.parametrize(
    ("colours", "depth", "key"),
    [
        *((0, depth, [1]) for depth in (1, 2, 4, 8)),
        (0, 16, [257]),
        (2, 8, [1, 2, 3]),
        (2, 16, [257, 514, 771]),
    ],
)
def test_a_transparent_colour_of_a_png_of_any_depth_is_transparent_and_no_other_is(colours, depth, key):
    other = [*key[:-1], key[-1] - 1]
    bits = "".join(f"{sample:0{depth}b}" for pixel in [key] * 8 + [other] * 8 for sample in pixel)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", 16, 16, depth, colours, 0, 0, 0)
    transparent = struct.pack(f">{len(key)}H", *key)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(row * 16)), (b"IEND", b"")]
    found = seen(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert found[:, :100].min() == 255
    assert found[:, 124:].max() <= 3


@pytest.mark.parametrize("alpha", [1, 2])
def test_grey_of_a_tiff_with_alpha_lies_on_white(alpha):
    """Alpha of kind 1 is multiplied into the grey, that of kind 2 is not."""
    data = encoded(Pillow.new("LA", (50, 50), (0, 128)), "TIFF")
    kind = struct.pack("<HHII", 338, 3, 1, 2)
    assert kind in data
    found = seen(data.replace(kind, struct.pack("<HHII", 338, 3, 1, alpha)))
    assert found[5, 5].tolist() == [127, 127, 127]


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
        (b"hello", "looks like plain text; send PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP"),
        ("Grüße, " * 300, "looks like plain text"),
        (b"\x80\x81\x82", "its 3 bytes are of no format that is known here; send PNG"),
        (b"<!DOCTYPE html><html>", "looks like an HTML page"),
        (b'  <svg xmlns="">', "looks like an SVG drawing"),
        (b'<?xml version="1.0"?><!-- Generator: --><svg xmlns="">', "looks like an SVG drawing"),
        (b'<?xml version="1.0"?><rss>', "looks like an XML file"),
        (b"%PDF-1.7", "looks like a PDF document"),
        (b"\0\0\0\x20ftypisom....", "looks like an MP4 video"),
        (b"\0\0\0\x14ftypqt  ....", "looks like a QuickTime video"),
        (b"\x1a\x45\xdf\xa3....webm", "looks like a WebM or Matroska video"),
        (b"RIFF\0\0\1\0AVI LIST", "looks like an AVI video"),
        (b"RIFF\0\0\1\0WAVEfmt ", "looks like a WAV sound"),
        (encoded(picture(), "ICO"), r"looks like an icon \(ICO\)"),
        (encoded(picture(), "PPM"), "looks like a Netpbm image"),
        (b"\xff\x0a\xfa\x7f", "looks like a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "looks like a JPEG XL image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "looks like a JPEG 2000 image"),
        (b"PK\x03\x04....", "looks like a ZIP archive"),
        (b'{"image": ', "looks like JSON"),
        (b64encode(encoded(picture(4, 4))), "looks like an image in base64: decode it first"),
        (b"https://example.org/a.png", "looks like the address of a file"),
        (encoded(picture(4, 4)).replace(b"\r", b"").replace(b"\n", b""), "changed as text on the way"),
        (encoded(picture(4, 4), "JPEG").decode("latin-1").encode(), "changed as text on the way"),
        (encoded(picture(4, 4), "JPEG").decode(errors="replace").encode(), "changed as text on the way"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
        (b"\xff\xd8\xff\xe0", "damaged or cut short"),
    ],
)
def test_what_is_no_image_says_what_to_send(data, message):
    with pytest.raises(InvalidImage, match=message):
        decode(data.encode() if isinstance(data, str) else data, LIMITS)


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


def test_the_files_that_are_damaged_below_decode_whole():
    for data in WHOLE:
        assert decode(data, LIMITS).pixels.shape == (3, 224, 224)


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_are_refused_and_nothing_else(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidImage, TooLarge):
        decode(bytes(whole), LIMITS)


WHOLE = [encoded(picture(40, 30), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]


PAD = (9, 120, 200)


@pytest.mark.parametrize("size", [(300, 900), (900, 300), (640, 360)])
def test_a_padded_picture_keeps_its_proportions_in_the_middle_of_one_colour(size):
    image = picture(*size)
    pixels = decode(encoded(image), LIMITS, viewport=Viewport.around(*size, PAD)).pixels.transpose(1, 2, 0)
    wide, high = (round(224 * side / max(size)) for side in size)
    left, top = (round((max(size) - side) // 2 * 224 / max(size)) for side in size)
    inside = np.zeros((224, 224), bool)
    inside[top : top + high, left : left + wide] = True
    assert (pixels[~inside] == PAD).all()
    shown = pixels[top : top + high, left : left + wide]
    assert np.array_equal(shown, np.asarray(image.resize((wide, high), Pillow.Resampling.BICUBIC)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_crop_is_what_pillow_crops_and_resizes(kind):
    image = picture(1800, 600)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    seen_crop = decode(data, LIMITS, viewport=Viewport(450, 0, 600, 1800, 600, PAD)).pixels.transpose(1, 2, 0)
    expected = image.crop((450, 0, 1050, 600)).resize((224, 224), Pillow.Resampling.BICUBIC)
    assert apart(seen_crop, expected) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_frame_is_of_the_upright_picture(orientation):
    upright = picture(400, 200)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Pillow.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert upright_size(data) == (400, 200)
    for viewport in (Viewport.around(400, 200, PAD), Viewport(150, 0, 200, 400, 200, PAD)):
        turned = decode(data, LIMITS, viewport=viewport).pixels
        assert np.array_equal(turned, decode(encoded(upright), LIMITS, viewport=viewport).pixels)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 2), (7, 3)])
def test_a_sliver_is_padded_too(size):
    pixels = decode(encoded(picture(*size)), LIMITS, (224, 448), Viewport.around(*size, PAD))
    assert {view.shape for view in pixels.views.values()} == {(3, 224, 224), (3, 448, 448)}


def test_transparent_pixels_are_white_and_the_padding_is_not():
    data = encoded(Pillow.new("RGBA", (100, 300), (10, 20, 30, 0)))
    pixels = decode(data, LIMITS, viewport=Viewport.around(100, 300, PAD)).pixels
    assert pixels[:, 112, 112].tolist() == [255, 255, 255]
    assert pixels[:, 112, 0].tolist() == list(PAD)
