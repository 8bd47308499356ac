"""Pages of PDFs and TIFFs: the right one, upright and sharp; and what hostile documents may cost."""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image as Pillow

from service.core.errors import InvalidImage, TooLarge
from service.core.viewport import Viewport, tiles_of
from service.media import formats
from service.media.decoder import ImageLimits, decode
from service.media.document import decode_page
from service.media.foreign import found_in
from service.media.header import header_size, page_count, require_page, upright_size
from service.media.pages import MAX_PAGES, MAX_TIFF_PAGES
from service.media.pdf import PAGE_SIDE
from service.media.store import Image
from service.media.tiff import tiff_pages
from tests.service.media.test_workers import workers
from tests.support.documents import (
    BLUE,
    GREEN,
    RED,
    Page,
    bomb,
    deep,
    encrypted,
    filled,
    pdf,
    showing,
    stream,
    tiff,
    written,
)
from tests.support.paths import PROJECT
from tests.support.pictures import LIMITS, encoded, picture

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
TWO = pdf([filled(RED), filled(BLUE, (100, -50, 300, 350), b"/Rotate 90")])
PLAIN = [Pillow.new("RGB", (60, 40), RED), Pillow.new("RGB", (30, 90), GREEN), Pillow.new("L", (20, 20), 255)]
PLACES = {"top left": (0.1, 0.1), "top right": (0.9, 0.1), "bottom left": (0.1, 0.9), "bottom right": (0.9, 0.9)}


def seen(data: bytes, **how: object) -> dict[str, tuple[int, ...]]:
    (pixels,) = decode_page(data, LIMITS, **how).views.values()
    side = pixels.shape[1]
    return {name: tuple(pixels[:, int(y * side), int(x * side)].tolist()) for name, (x, y) in PLACES.items()}


def corners(colour: tuple[int, int, int], black: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(PLACES, colour) | {black: BLACK}


def test_each_page_of_a_pdf_has_its_own_colour_size_turn_and_place():
    assert seen(TWO) == seen(TWO, page=1) == corners(RED, "top left")
    assert seen(TWO, page=2) == corners(BLUE, "top right")  # turned to the right, from a box beside the origin
    first, second = (decode_page(TWO, LIMITS, page=page) for page in (1, 2))
    assert (first.width, first.height, first.pages) == (PAGE_SIDE, round(PAGE_SIDE * 2 / 3), 2)
    assert (second.width, second.height, second.pages) == (PAGE_SIDE, PAGE_SIDE // 2, 2)


@pytest.mark.parametrize(("turn", "black"), [(0, 0), (90, 1), (180, 3), (270, 2)])
def test_a_turned_page_is_upright(turn, black):
    data = pdf([filled(GREEN, extra=b"/Rotate %d" % turn)])
    assert seen(data) == corners(GREEN, list(PLACES)[black])


def test_a_page_without_a_view_is_only_measured():
    measured = decode_page(TWO, LIMITS, (), page=2)
    assert (measured.views, measured.width, measured.height, measured.pages) == ({}, PAGE_SIDE, PAGE_SIDE // 2, 2)


def stripes() -> bytes:
    """A page of 100 by 1000 points with black and white stripes, 2 points each, in its lowest tenth."""
    rows = b" ".join(b"0 %d 100 2 re f" % y for y in range(0, 100, 4))
    return pdf([Page(b"0 g " + rows, (0, 0, 100, 1000))])


def test_a_tile_is_drawn_sharply_and_not_enlarged_from_the_whole():
    data = stripes()
    size = decode_page(data, LIMITS, ()).width, PAGE_SIDE
    tiles = tiles_of(*size, WHITE)
    whole, tile = (decode_page(data, LIMITS, (448,), each).views[448][0] for each in (None, tiles[-1]))
    assert np.isin(tile[-200:, 224], (0, 255)).mean() > 0.6
    assert not np.isin(whole[-40:, 224], (0, 255)).any()  # of the whole page, 2 points are less than a pixel


def test_padding_has_its_colour_and_the_page_is_white():
    data = pdf([Page(b"", (0, 0, 300, 100))])
    grey = (9, 99, 199)
    size = decode_page(data, LIMITS, ())
    padded = decode_page(data, LIMITS, (224,), Viewport.around(size.width, size.height, grey)).pixels
    assert [tuple(padded[:, y, 112].tolist()) for y in (5, 112, 218)] == [grey, WHITE, grey]


def test_a_scan_in_a_pdf_is_as_its_picture_is():
    scan = picture(224, 224)
    jpeg = encoded(scan, "JPEG", quality=95)
    apart = np.abs(
        decode_page(pdf([showing(jpeg)]), LIMITS).pixels.astype(int) - decode(jpeg, LIMITS).pixels.astype(int)
    )
    assert apart.mean() < 3


def test_each_page_of_a_tiff_has_its_own_size_and_colour():
    data = tiff(PLAIN)
    for page, image in enumerate(PLAIN, 1):
        decoded = decode_page(data, LIMITS, page=page)
        assert (decoded.width, decoded.height, decoded.pages) == (*image.size, 3)
        assert header_size(data, page) == upright_size(data, page) == image.size
        assert tuple(decoded.pixels[:, 100, 100].tolist()) == image.convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize(
    ("data", "pages"), [(TWO, 2), (tiff(PLAIN), 3), (tiff(PLAIN[:1]), 1), (encoded(PLAIN[0], "PNG"), 1)]
)
@pytest.mark.parametrize("beyond", [1, 100_000])
def test_a_page_that_is_not_there_is_named_with_how_many_there_are(data, pages, beyond):
    says = f"has {pages} pages: send 1 to {pages}" if pages > 1 else "has one page: leave page out"
    with pytest.raises(InvalidImage, match=says) as caught:
        decode_page(data, LIMITS, page=pages + beyond)
    assert (caught.value.code, caught.value.param) == ("page_not_found", "page")
    if data is not TWO:
        with pytest.raises(InvalidImage, match=says):
            require_page(data, pages + beyond)


def test_a_tiff_whose_pages_go_round_ends():
    data = bytearray(tiff(PLAIN[:2]))
    order = "little" if data[:2] == b"II" else "big"
    first = int.from_bytes(data[4:8], order)
    second_at = first + 2 + 12 * int.from_bytes(data[first : first + 2], order)
    second = int.from_bytes(data[second_at : second_at + 4], order)
    end = second + 2 + 12 * int.from_bytes(data[second : second + 2], order)
    data[end : end + 4] = data[4:8]
    assert tiff_pages(bytes(data)) == 2
    with pytest.raises(InvalidImage, match="has 2 pages"):
        decode(bytes(data), LIMITS, page=3)


def test_the_pages_of_a_tiff_are_counted_to_a_limit():
    entry = 8 + 6 * np.arange(1, MAX_TIFF_PAGES + 5)  # directories without a tag, each behind the one before
    data = b"II*\0\x08\0\0\0" + b"".join(b"\0\0" + int(place).to_bytes(4, "little") for place in entry)
    assert tiff_pages(data) == MAX_TIFF_PAGES
    assert header_size(data, MAX_TIFF_PAGES) is header_size(data, 1_000_000) is None
    with pytest.raises(InvalidImage, match="of a TIFF the first 2,000 are read"):
        decode(data, LIMITS, page=MAX_TIFF_PAGES + 1)


def test_a_pdf_is_known_by_its_mark_and_has_no_size_before_it_is_opened():
    for data in (TWO, b"\xef\xbb\xbf" + TWO, b"x" * 1000 + TWO):
        assert formats.is_pdf(data)
        assert header_size(data) is page_count(data) is None
        assert decode_page(data, LIMITS).pages == 2
    assert not formats.is_pdf(b"x" * 1024 + TWO)
    jpeg = encoded(PLAIN[0], "JPEG", comment=b"%PDF-1.4")
    assert not formats.is_pdf(jpeg)
    assert decode_page(jpeg, LIMITS).width == 60


def test_without_the_extra_a_pdf_is_refused_with_what_the_operator_installs(monkeypatch):
    monkeypatch.setattr(formats, "HAS_PDFIUM", False)
    assert header_size(TWO) == (0, 0)  # it costs nothing
    with pytest.raises(
        InvalidImage,
        match=r"PDF document .*pip install -c constraints\.txt -e '\.\[pdf\]' in Glimpse's folder\); send PNG",
    ):
        decode_page(TWO, LIMITS)
    assert found_in(TWO, "video") == "not a video that can be read: it looks like a PDF document"


def test_the_gateways_process_does_not_load_pdfium():
    code = "import sys, service.app, service.media.workers; sys.exit('pypdfium2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=PROJECT).returncode == 0


def test_a_page_has_a_digest_of_its_own_and_the_first_one_that_of_the_file():
    image = Image.of(TWO)
    assert image.at(1) is image.file is image
    second = image.at(2)
    assert (second.page, second.file) == (2, image)
    assert len({image.digest, second.digest, image.at(22).digest}) == 3


def forms(levels: int) -> bytes:
    """A page that draws ten forms, each of which draws ten, and so on."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>",
        stream(b"<</Length 5>>", b"/F Do"),
    ]
    for level in range(levels):
        kind = b"<</Type/XObject/Subtype/Form/BBox[0 0 300 200]/Resources<</XObject<</F %d 0 R>>>>/Length 60>>"
        objects.append(stream(kind % (6 + level), b"/F Do " * 10))
    objects.append(stream(b"<</Type/XObject/Subtype/Form/BBox[0 0 300 200]/Length 17>>", b"0 0 100 100 re f "))
    return written(objects)


def operators(count: int) -> bytes:
    """A page of so many lines, which deflate makes small."""
    content = zlib.compress(b"0 0 m 300 200 l S " * count, 9)
    return written(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R>>",
            stream(b"<</Filter/FlateDecode/Length %d>>" % len(content), content),
        ]
    )


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"%PDF-1.7", InvalidImage, "damaged or cut short"),
        (TWO[:400], InvalidImage, "damaged or cut short"),
        (encrypted(), InvalidImage, "encrypted: send one without a password"),
        (pdf([]), InvalidImage, "no pages"),
        (pdf([filled(RED)] * 3, count=MAX_PAGES + 1), TooLarge, "pages, the limit is 10,000"),
        (deep(5000), InvalidImage, "page 1 of the PDF is damaged"),
        (pdf([filled(RED, (0, 0, 10**9, 10**9))]), TooLarge, "side of 1,000,000,000 points"),
        (pdf([bomb(10_000, 10_000)]), TooLarge, r"an image of 10000x10000 pixels \(100.0 megapixels\)"),
        (pdf([bomb(100_000, 2)]), TooLarge, "an image of 100000x2 pixels"),
        (bytes(LIMITS.max_bytes - len(TWO) + 1) + TWO, TooLarge, "bytes, the limit is"),
    ],
)
def test_hostile_documents_are_refused_with_what_is_wrong(data, error, message):
    with pytest.raises(error, match=message):
        decode_page(data, ImageLimits(max_bytes=LIMITS.max_bytes))


@pytest.mark.parametrize(
    "data",
    [
        pdf([filled(RED, (0, 0, 14_400, 14_400))]),
        pdf([filled(RED, (0, 0, 0.01, 0.02))]),
        pdf([filled(RED, (0, 0, 1, 100_000))]),
        pdf([filled(RED, (-900_000, 0, 100_000, 200))]),
        TWO.replace(b"startxref\n", b"startxref\n9"),  # PDFium looks for the objects itself
    ],
)
@pytest.mark.parametrize("fit", ["pad", "tiles"])
def test_pages_of_any_size_are_drawn_in_any_way(data, fit):
    size = decode_page(data, LIMITS, ())
    views = [Viewport.around(size.width, size.height, BLUE), *tiles_of(size.width, size.height, BLUE)]
    for viewport in views[:1] if fit == "pad" else views[1:]:
        drawn = decode_page(data, LIMITS, (224,), viewport).pixels != np.array(BLUE)[:, None, None]
        assert drawn.any()


def test_a_form_that_draws_itself_is_drawn_once():
    form = stream(b"<</Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</F 3 0 R>>>>/Length 5>>", b"/F Do")
    assert decode_page(pdf([Page(b"/F Do", objects={b"F": form})]), LIMITS).pages == 1


@pytest.mark.slow
async def test_a_document_that_costs_too_much_ends_its_worker_only():
    async with workers(ImageLimits(), cpu_s=0.4) as found:
        for data in (forms(20), operators(3_000_000)):
            with pytest.raises(TooLarge, match=r"more than 0\.4 s of CPU time"):
                await found.decode(data, (224,))
        decoded = await found.decode(TWO, (224,), page=2)
        assert (decoded.width, decoded.height, decoded.pages) == (PAGE_SIDE, PAGE_SIDE // 2, 2)
        assert np.array_equal(decoded.pixels, decode_page(TWO, LIMITS, page=2).pixels)
        with pytest.raises(InvalidImage) as caught:
            await found.decode(TWO, (224,), page=3)
        assert (caught.value.code, caught.value.param) == ("page_not_found", "page")


@pytest.mark.slow
async def test_a_document_that_takes_too_much_memory_ends_its_worker_only():
    async with workers(ImageLimits(), memory_bytes=64 * 1024 * 1024) as found:
        with pytest.raises((InvalidImage, TooLarge)):
            await found.decode(operators(10_000_000), (224,))
        assert (await found.decode(TWO, (224,))).pages == 2


def mutants(count: int) -> Iterator[bytes]:
    """Documents of which some bytes are changed, cut out, doubled or put elsewhere."""
    draw = random.Random(7)
    jpeg = encoded(picture(64, 64), "JPEG")
    whole = [TWO, pdf([showing(jpeg, 64)]), deep(5), forms(1), pdf([bomb(200, 200)]), encrypted()]
    words = [b"/Kids", b"obj", b"endstream", b"R", b"<<", b">>", b"-1", b"99999999999", b"/Count", b"[", b"xref"]
    for _ in range(count):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 6)):
            at, to = sorted(draw.randrange(5, len(data)) for _ in range(2))
            match draw.randrange(5):
                case 0:
                    data[at] = draw.randrange(256)
                case 1:
                    del data[at : at + draw.randint(1, 30)]
                case 2:
                    data[at:at] = data[at : min(to, at + 200)]
                case 3:
                    data[at : at + 4] = draw.choice(words)
                case _:
                    data[to:to] = data[at : at + draw.randint(1, 60)]
            if len(data) < 20:
                break
        yield bytes(data)


@pytest.mark.slow
async def test_mutants_are_drawn_or_refused():
    """Some make PDFium take all the memory that there is, and end their worker at its limit."""
    drawn = refused = 0
    async with workers(LIMITS, cpu_s=2, memory_bytes=256 << 20) as found:
        for data in mutants(400):
            try:
                decoded = await found.decode(data, (224,))
                assert decoded.pixels.shape == (3, 224, 224)
                drawn += 1
            except (InvalidImage, TooLarge):
                refused += 1
    assert min(drawn, refused) > 20
