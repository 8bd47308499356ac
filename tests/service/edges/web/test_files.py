"""The page with an image that moves, and with a document: a real Chromium on a service without Triton."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import pytest
from PIL import Image as Pillow

from service.media import formats
from tests.service.edges.web.conftest import BYTES, Kept, Open, Visit, text_of
from tests.service.edges.web.test_films import PLACES, take
from tests.service.edges.web.test_page import DROP, PHONE, TROUBLE
from tests.support import films
from tests.support.documents import BLUE, GREEN, RED, filled, pdf, tiff
from tests.support.fakes import png

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

COUNT = 10
PDF = pdf([filled(RED), filled(BLUE, (0, 0, 100, 200)), filled(GREEN)])
TIFF = tiff([Pillow.new("RGB", (60, 40), RED), Pillow.new("RGB", (40, 60), BLUE)])
MOVING = "#stage img"
KINDS = """async (texts) => {
    const { kindOf } = await import("./page/kinds.js");
    return Promise.all(texts.map((text) => kindOf(new File([BYTES], "file"))));
}""".replace("BYTES", BYTES)
SEEN = "(canvases) => canvases.map((canvas) => canvas.width / canvas.height)"


def webp(count: int = COUNT) -> bytes:
    first, *others = (films.frame(index, count) for index in range(count))
    out = BytesIO()
    moving = {"save_all": True, "append_images": others, "duration": 200} if others else {}
    first.save(out, "WEBP", lossless=True, **moving)
    return out.getvalue()


def extended_webp() -> bytes:
    """A still WebP with the chunk that could say that it moves."""
    out = BytesIO()
    Pillow.new("RGBA", (8, 8), (1, 2, 3, 4)).save(out, "WEBP", lossless=True, exif=b"Exif\0\0")
    return out.getvalue()


def gif_of(*blocks: bytes, flags: int = 0x80) -> bytes:
    table = bytes(6) if flags & 0x80 else b""
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, flags, 0, 0) + table + b"".join(blocks) + b"\x3b"


def pieces(*contents: bytes) -> bytes:
    return b"".join(bytes([len(each)]) + each for each in contents) + b"\0"


def gif_picture(*contents: bytes, flags: int = 0) -> bytes:
    table = bytes(3 << (flags & 7) + 1) if flags & 0x80 else b""
    return b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, flags) + table + b"\x02" + pieces(*contents or (b"\x44\x01",))


CONTROL = b"\x21\xf9" + pieces(b"\x00\x0a\x00\x00")
REPEATS = b"\x21\xff" + pieces(b"NETSCAPE2.0", b"\x01\x00\x00")
DECOY = CONTROL + gif_picture() + CONTROL + gif_picture()  # a whole animation, where none is
GIF = {"kind": "animation", "type": "image/gif"}
OTHER = {"kind": "other"}
TOLD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a GIF that moves": (films.gif(), GIF),
    "a GIF of one picture": (films.gif(1), OTHER),
    "one picture, said to repeat": (gif_of(REPEATS, CONTROL, gif_picture()), OTHER),
    "two pictures": (gif_of(gif_picture(), gif_picture()), GIF),
    "two pictures behind tables of colours": (gif_of(CONTROL, *[gif_picture(flags=0x83)] * 2, flags=0), GIF),
    "a comment that holds two": (gif_of(b"\x21\xfe" + pieces(DECOY), gif_picture()), OTHER),
    "a picture whose pixels hold two": (gif_of(gif_picture(DECOY, DECOY)), OTHER),
    "two behind the end": (gif_of(gif_picture()) + DECOY, OTHER),
    "a GIF that is cut short": (films.gif()[:40], OTHER),
    "the second far behind": (gif_of(gif_picture(*[bytes(255)] * 8_000), CONTROL, gif_picture()), GIF),
    "a WebP that moves": (webp(), {"kind": "animation", "type": "image/webp"}),
    "a WebP of one picture": (webp(1), OTHER),
    "a WebP with more than its picture": (extended_webp(), OTHER),
    "a PDF": (PDF, {"kind": "document", "format": "PDF"}),
    "a PDF behind other bytes": (b"\n" * 500 + PDF, {"kind": "document", "format": "PDF"}),
    "a PNG that names a PDF": (png()[:8] + b"%PDF-1.4", OTHER),
    "a TIFF": (TIFF, {"kind": "document", "format": "TIFF"}),
    "a TIFF with the large byte first": (b"MM\0\x2a\0\0\0\x08", {"kind": "document", "format": "TIFF"}),
    "a PNG": (png(), OTHER),
    "nothing": (b"", OTHER),
}


async def test_the_bytes_of_a_file_say_what_it_is(visit: Visit) -> None:
    told = await visit.page.evaluate(KINDS, [text_of(data) for data, _ in TOLD.values()])
    assert dict(zip(TOLD, told, strict=True)) == {name: kind for name, (_, kind) in TOLD.items()}


# Images that move.
@pytest.mark.parametrize(("name", "way"), [("clip.gif", "choose"), ("clip.webp", "drop"), ("clip.gif", "paste")])
async def test_an_image_that_moves_is_shown_so_and_asked_as_a_video(visit: Visit, name: str, way: str) -> None:
    content = films.gif(COUNT) if name.endswith("gif") else webp()
    if way == "choose":
        await visit.choose(content, name)
    else:
        await visit.page.evaluate(DROP, [name, text_of(content), way])
    await visit.page.wait_for_selector(MOVING)
    assert await visit.page.get_attribute(MOVING, "alt") == f"{name}, moving"
    assert await visit.page.locator(MOVING).evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 112
    assert not await visit.page.is_visible("#stage canvas")
    await visit.page.click("#settings summary")
    await visit.page.fill("#frames-a", "3")
    await visit.ask("which way?")
    assert await visit.answers() == ["a red square"]
    (asked,) = visit.posted("/v1/vqa")
    assert (asked.post_data_json["video"][:4], "image" in asked.post_data_json) == ("img_", False)
    captions = await visit.page.locator("#stage figcaption").all_inner_texts()
    indices = [int(caption.split()[1].rstrip(",")) for caption in captions]
    assert indices == [0, 4, 9]
    await visit.page.locator("#views label", has_text="Image").click()
    shown = await visit.page.locator("#stage canvas").evaluate_all(PLACES)
    assert shown == pytest.approx([(16 + i * 80 / 9) / 112 for i in indices], abs=0.03)
    await visit.page.click(".code summary")
    assert f"-F 'video=@\"{name}\"'" in await visit.page.inner_text(".code code")


@pytest.mark.parametrize(("content", "name"), [(films.gif(1), "still.gif"), (extended_webp(), "still.webp")])
async def test_an_image_that_stands_still_is_asked_as_an_image(visit: Visit, content: bytes, name: str) -> None:
    await take(visit, content, name)
    await visit.ask("what is there?")
    assert await visit.answers() == ["a red square"]
    (asked,) = visit.posted("/v1/vqa")
    assert ("image" in asked.post_data_json, "video" in asked.post_data_json) == (True, False)
    assert await visit.page.locator(MOVING).count() == 0


async def test_what_moves_can_be_paused_with_the_keyboard(visit: Visit) -> None:
    await visit.choose(films.gif(), "clip.gif")
    await visit.page.wait_for_selector(MOVING)
    await visit.page.locator("#stage button").press("Enter")
    assert await visit.page.is_hidden(MOVING)
    assert await visit.page.locator("#stage canvas").get_attribute("aria-label") == "clip.gif."
    assert await visit.page.locator("#stage canvas").evaluate_all(PLACES) == pytest.approx([16 / 112], abs=0.02)
    await visit.page.locator("#stage button", has_text="Play").press("Enter")
    assert await visit.page.is_visible(MOVING)


async def test_what_moves_rests_for_a_visitor_who_wants_less_motion(service: Kept, open_page: Open) -> None:
    visit = await open_page(service.url, reduced_motion="reduce")
    await take(visit, films.gif(), "clip.gif")
    assert await visit.page.is_hidden(MOVING)
    assert await visit.page.inner_text("#stage button") == "Play"


async def test_an_image_that_moves_is_freed_once_no_answer_shows_it(visit: Visit) -> None:
    await visit.page.evaluate(
        "() => { const revoke = URL.revokeObjectURL; window.freed = [];"
        " URL.revokeObjectURL = (url) => { window.freed.push(url); revoke.call(URL, url); }; }"
    )
    await visit.choose(films.gif(), "clip.gif")
    address = await visit.page.get_attribute(MOVING, "src")
    await take(visit, png())
    assert await visit.page.evaluate("window.freed") == [address]


async def test_a_browser_without_a_decoder_keeps_the_answer(visit: Visit) -> None:
    await visit.page.evaluate("delete window.ImageDecoder")
    await visit.choose(films.gif(), "clip.gif")
    await visit.page.wait_for_selector(MOVING)
    await visit.ask("which way?")
    assert await visit.answers() == ["a red square"]
    assert "This browser cannot show the frames of this video." in await visit.page.inner_text(".run")
    assert await visit.page.is_visible(MOVING)


async def test_a_video_has_a_control_of_frames_and_an_image_has_none(visit: Visit) -> None:
    await take(visit, png())
    await visit.page.click("#settings summary")
    assert await visit.page.is_hidden("#frames-a")
    await visit.choose(films.gif(COUNT), "clip.gif")
    await visit.page.fill("#frames-a", "33")
    await visit.ask("which way?")
    assert visit.posted("/v1/vqa") == []
    await visit.page.fill("#frames-a", "3")
    await visit.ask("which way?")
    assert await visit.answers() == ["a red square"]
    (asked,) = visit.posted("/v1/vqa")
    assert asked.post_data_json["video_frames"] == 3
    assert await visit.page.locator("#stage canvas").count() == 3
    assert "3 frames at most" in await visit.page.inner_text(".run")
    await visit.page.click(".code summary")
    assert "--form-string 'video_frames=3'" in await visit.page.inner_text(".code code")
    await take(visit, png())
    await visit.ask("what is there?")
    await visit.answers()
    assert "video_frames" not in visit.posted("/v1/vqa")[-1].post_data_json


# Documents.
async def opened(visit: Visit, content: bytes = PDF, name: str = "report.pdf") -> None:
    await visit.choose(content, name)
    await visit.page.locator("#stage .empty strong", has_text=name).wait_for()


@pytest.mark.parametrize(("content", "name", "pages"), [(PDF, "report.pdf", 3), (TIFF, "scan.tiff", 2)])
async def test_a_page_of_a_document_is_asked_about(
    visit: Visit, service: Kept, content: bytes, name: str, pages: int
) -> None:
    assert await visit.page.is_hidden("#page")
    await opened(visit, content, name)
    assert f"cannot draw the pages of a {name[-4:].strip('.').upper()}" in await visit.page.inner_text("#stage")
    assert (await visit.page.input_value("#page"), await visit.page.get_attribute("#page", "min")) == ("1", "1")
    await visit.page.fill("#page", "2")
    await visit.ask("what colour?")
    assert await visit.answers() == ["a red square"]
    (asked,) = visit.posted("/v1/vqa")
    assert (asked.post_data_json["image"][:4], asked.post_data_json["page"]) == ("img_", 2)
    assert await visit.page.inner_text("#stage figcaption") == "page 2"
    assert (
        f"This browser cannot draw page 2 of {name}, so its map stands alone, in the proportions of page 1."
        in await visit.page.inner_text("#caption")
    )
    assert (await visit.page.locator("#stage canvas").get_attribute("aria-label") or "").startswith(
        f"{name}, page 2. Relevance. Most relevant:"
    )
    assert (await visit.page.inner_text("#page-count"), await visit.page.get_attribute("#page", "max")) == (
        f"of {pages}",
        str(pages),
    )
    assert f"Page 2 of {name}" in await visit.page.inner_text(".entry")
    offered = await visit.page.locator("#views label:visible").all_inner_texts()
    assert offered == ["Relevance", "Propositional", "Perspectival", "Participatory", "Levels"]


async def test_each_page_is_another_question_about_one_file(visit: Visit) -> None:
    await opened(visit)
    for page in ("1", "3"):
        await visit.page.fill("#page", page)
        await visit.page.press("#page", "Enter") if page == "3" else await visit.ask("what colour?")
        assert await visit.answers() == ["a red square"]
    assert [each.post_data_json["page"] for each in visit.posted("/v1/vqa")] == [1, 3]
    assert len(visit.posted("/v1/images")) == 1
    await visit.page.get_by_text("Show on the page").click()  # the first
    assert await visit.page.inner_text("#stage figcaption") == "page 1"
    assert await visit.page.input_value("#page") == "1"
    await take(visit, png())
    assert await visit.page.is_hidden("#page")
    assert await visit.page.locator("#views label", has_text="Image").count() == 1
    await visit.ask("what is there?")
    await visit.answers()
    assert "page" not in visit.posted("/v1/vqa")[-1].post_data_json


async def test_a_blank_page_has_the_pages_proportions(visit: Visit) -> None:
    await opened(visit)
    await visit.page.click("#settings summary")
    for page, fit, shape in (("1", "squash", 3 / 2), ("2", "squash", 3 / 2), ("2", "pad", 1 / 2)):
        await visit.page.fill("#page", page)
        await visit.page.select_option("#fit-a", fit)
        await visit.ask("what colour?")
        await visit.answers()
        assert await visit.page.locator("#stage canvas").evaluate_all(SEEN) == pytest.approx([shape], abs=0.01)
        is_guessed = "in the proportions of page 1" in await visit.page.inner_text("#caption")
        assert is_guessed == ((page, fit) == ("2", "squash"))


async def test_the_map_of_a_page_lies_on_white(visit: Visit) -> None:
    await opened(visit)
    white = "(canvas) => [...canvas.getContext('2d').getImageData(2, 2, 1, 1).data]"
    await visit.ask("what colour?")
    await visit.answers()
    await visit.page.fill("#strength", "0.2")
    pixel = await visit.page.locator("#stage canvas").evaluate(white)
    assert min(pixel[:3]) > 180


async def test_a_page_that_is_not_there_is_told_and_how_many_there_are(visit: Visit) -> None:
    await opened(visit)
    await visit.page.fill("#page", "9")
    await visit.ask("what colour?")
    await visit.page.wait_for_selector(TROUBLE)
    assert await visit.page.inner_text(TROUBLE) == "The document has no such page"
    assert "Page is 9, and the document has 3 pages: send 1 to 3." in await visit.page.inner_text("#trouble")
    assert await visit.page.inner_text("#page-count") == "of 3"
    for wrong in ("9", "0", "1.5", ""):
        await visit.page.fill("#page", wrong)
        await visit.ask("what colour?")
    assert len(visit.posted("/v1/vqa")) == 1


async def test_a_service_without_pdfium_says_so(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "HAS_PDFIUM", False)
    await opened(visit)
    await visit.ask("what colour?")
    await visit.page.wait_for_selector(TROUBLE)
    trouble = await visit.page.inner_text("#trouble")
    assert "if the operator has run .venv/bin/pip install -c constraints.txt -e '.[pdf]'" in trouble


@pytest.mark.parametrize(
    ("language", "asked"),
    [
        ("curl", ["-F 'image=@\"report.pdf\"'", "--form-string 'page=2'"]),
        ("Python", ['open("report.pdf", "rb") as image', '"page": 2']),
        ("JavaScript", ['readFile("report.pdf")', '"page":2']),
    ],
)
async def test_the_request_as_code_names_the_page(visit: Visit, language: str, asked: list[str]) -> None:
    await opened(visit)
    await visit.page.fill("#page", "2")
    await visit.ask("what colour?")
    await visit.answers()
    await visit.page.click(".code summary")
    await visit.page.locator(".languages button", has_text=language).click()
    code = await visit.page.inner_text(".code code")
    assert [each for each in asked if each not in code] == []


async def test_a_document_that_the_browser_draws_shows_its_first_page(visit: Visit) -> None:
    """As Safari draws a TIFF."""
    await visit.page.evaluate(
        "() => { const make = createImageBitmap; window.createImageBitmap = (of, ...how) =>"
        " of.name === 'scan.tiff' ? make(new ImageData(60, 40)) : make(of, ...how); }"
    )
    await take(visit, TIFF, "scan.tiff")
    assert await visit.page.inner_text("#stage figcaption") == "page 1"
    await visit.ask("what colour?")
    await visit.answers()
    assert await visit.page.locator("#views label:visible").count() == 6
    assert "cannot draw" not in await visit.page.inner_text("#caption")
    await visit.page.locator("#views label", has_text="Image").click()
    await visit.page.fill("#page", "2")
    await visit.ask("what colour?")
    await visit.answers()
    assert "cannot draw page 2 of scan.tiff" in await visit.page.inner_text("#caption")
    assert await visit.page.is_checked("#views [value=map]")


@pytest.mark.parametrize(
    ("content", "name"), [(PDF, "a-report-with-a-long-name-of-2026.pdf"), (films.gif(), "clip.gif")]
)
async def test_a_telephone_shows_them_without_scrolling_sideways(
    service: Kept, open_page: Open, content: bytes, name: str
) -> None:
    visit = await open_page(service.url, **PHONE)
    await visit.choose(content, name)
    await visit.page.wait_for_selector(f"{MOVING}, #stage .empty strong")
    wide = "document.documentElement.scrollWidth"
    assert await visit.page.evaluate(wide) == 320
    await visit.ask("what colour?")
    await visit.answers()
    assert await visit.page.evaluate(wide) == 320
