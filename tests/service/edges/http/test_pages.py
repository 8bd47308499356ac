"""A document's page over HTTP, with a service without Triton: asked for in every way, kept, estimated, refused."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio
from PIL import Image as Pillow

from service.edges.http.application import http_api
from service.media import formats
from tests.service.test_pipeline import shades
from tests.support.documents import Page, filled, pdf, tiff
from tests.support.fakes import CLOSER, House, png

GREY = 60
PDF = pdf([Page(b"1 g 0 0 300 200 re f"), Page(b"0 g 0 0 300 100 re f", (0, 0, 300, 100))])
TIFF = tiff([Pillow.new("RGB", (64, 48), (255,) * 3), Pillow.new("RGB", (64, 48), (0,) * 3)])
WHITE, BLACK = 255, 0
QUESTION = "what colour?"


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    house = House(replace(CLOSER, pad_colour=(GREY,) * 3), visual_cache_bytes=1_000_000)
    yield house
    house.reader.close()


@pytest_asyncio.fixture
async def http(house: House) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def error(response: httpx.Response) -> tuple[int, str, str]:
    told = response.json()["error"]
    return response.status_code, told["code"], told["param"]


@pytest.mark.parametrize("data", [PDF, TIFF])
async def test_the_page_that_is_asked_for_is_seen_and_cached_by_itself(house, http, data):
    asked = {"image": in_base64(data), "question": QUESTION}
    said = [(await http.post("/v1/vqa", json=asked | page)).json() for page in ({}, {"page": 2}, {"page": 1})]
    assert [shades(house, number) for number in range(3)] == [[WHITE], [BLACK], [WHITE]]
    assert [each["vision"]["cache"] for each in said] == ["miss", "miss", "hit"]
    assert house.vision.calls == ["see", "see"]
    ids = [prompt.extra_ids.tolist() for prompt in house.language.prompts]
    assert ids[0] == ids[2] != ids[1]
    assert len({each["image_ids"][0] for each in said}) == 1
    by_id = {"image": said[0]["image_ids"][0], "question": "and this?", "page": 2}
    assert (await http.post("/v1/vqa", json=by_id)).json()["vision"]["cache"] == "hit"
    assert shades(house) == [BLACK]


@pytest.mark.parametrize(("data", "size"), [(PDF, (2912, 1941)), (TIFF, (64, 48))])
async def test_a_document_is_kept_and_told_with_its_pages(house, http, data, size):
    kept = (await http.post("/v1/images", content=data)).json()
    assert (kept["pages"], kept["width"], kept["height"]) == (2, *size)
    form = {"file": ("x.pdf", data, "application/pdf")}
    file = (await http.post("/v1/files", files=form, data={"purpose": "user_data"})).json()
    assert (file["id"], file["pages"], file["purpose"]) == (kept["id"], 2, "user_data")
    plain = (await http.post("/v1/images", content=png())).json()
    assert plain["pages"] == 1
    for page, shade in ((2, BLACK), (1, WHITE)):
        body = {"image": kept["id"], "question": QUESTION, "page": page}
        assert (await http.post("/v1/vqa", json=body)).status_code == 200
        assert shades(house) == [shade]


async def test_a_form_a_batch_and_a_chat_ask_about_a_page(house, http):
    file = {"image": ("x.pdf", PDF, "application/pdf")}
    assert (await http.post("/v1/vqa", files=file, data={"question": QUESTION, "page": "2"})).status_code == 200
    assert shades(house) == [BLACK]
    lines = [{"image": in_base64(PDF), "question": f"{QUESTION} {page}", "page": page} for page in (1, 2)]
    said = (await http.post("/v1/vqa/batch", json=lines)).text.splitlines()
    assert len(said) == 2
    assert {shades(house, -1)[0], shades(house, -2)[0]} == {WHITE, BLACK}
    image_id = (await http.post("/v1/images", content=PDF)).json()["id"]
    data = f"data:application/pdf;base64,{in_base64(PDF)}"
    large = f"data:application/pdf;base64,{in_base64(PDF + bytes(3000))}"  # cut out of the body
    for file in ({"file_data": data, "filename": "x.pdf"}, {"file_data": large}, {"file_id": image_id}):
        content = [{"type": "file", "file": file}, {"type": "text", "text": f"{QUESTION} {list(file)}"}]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        for page, shade in (({}, WHITE), ({"page": 2}, BLACK)):
            response = await http.post("/v1/chat/completions", json=chat | page)
            assert response.status_code == 200, response.text
            assert shades(house) == [shade]


@pytest.mark.parametrize("data", [PDF, TIFF])
async def test_a_page_that_is_not_there_is_refused_everywhere(house, http, data):
    asked = {"image": in_base64(data), "question": QUESTION, "page": 3}
    response = await http.post("/v1/vqa", json=asked)
    assert error(response) == (400, "page_not_found", "page")
    assert response.json()["error"]["message"] == "page is 3, and the document has 2 pages: send 1 to 2"
    url = f"data:;base64,{in_base64(data)}"
    for content in ({"type": "file", "file": {"file_data": url}}, {"type": "image_url", "image_url": {"url": url}}):
        messages = [{"role": "user", "content": [content, {"type": "text", "text": QUESTION}]}]
        chat = {"model": "tiny", "messages": messages, "page": 3}
        assert error(await http.post("/v1/chat/completions", json=chat)) == (400, "page_not_found", "page")
    if data is TIFF:
        assert error(await http.post("/v1/vqa/estimate", json=asked)) == (400, "page_not_found", "page")
    assert not house.vision.calls


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": [in_base64(PDF)]}, "page"),
        ({"image": in_base64(PDF), "video": "img_1"}, "page"),
        ({"image": in_base64(PDF), "frames": ["img_1"]}, "page"),
        ({"image": in_base64(PDF), "page": 0}, "page"),
        ({"image": in_base64(PDF), "page": "2"}, "page"),
        ({"image": in_base64(png())}, "page"),
    ],
)
async def test_what_a_page_does_not_go_with_is_refused(http, fields, param):
    response = await http.post("/v1/vqa", json={"question": QUESTION, "page": 2} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_two_images_of_a_chat_or_a_form_have_no_page(http):
    files = [("image", ("x.pdf", PDF)), ("image", ("y.pdf", PDF))]
    response = await http.post("/v1/vqa", files=files, data={"question": QUESTION, "page": "1"})
    assert error(response) == (400, "invalid_request", "page")
    image = {"type": "image_url", "image_url": {"url": in_base64(png())}}
    messages = [{"role": "user", "content": [image, image, {"type": "text", "text": QUESTION}]}]
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "page": 1})
    assert error(response) == (400, "invalid_request", "page")


@pytest.mark.parametrize(
    ("file", "param"),
    [
        ({}, "messages.0.content.0.file"),
        ({"file_data": "QUJD", "file_id": "img_1"}, "messages.0.content.0.file"),
        ({"file_data": "!"}, "messages.0.content.0.file.file_data"),
        ({"file_data": in_base64(b"hello")}, "messages.0.content.0.file.file_data"),
        ({"file_id": "img_1"}, "messages.0.content.0.file.file_id"),
        ({"url": "x"}, "messages.0.content.0.file.url"),
    ],
)
async def test_a_file_that_is_wrong_is_named_by_its_place(http, file, param):
    content = [{"type": "file", "file": file}, {"type": "text", "text": QUESTION}]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    response = await http.post("/v1/chat/completions", json=chat)
    status = 404 if file == {"file_id": "img_1"} else 400
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_a_page_of_a_pdf_is_fitted_once_its_size_is_known(house, http):
    asked = {"image": in_base64(PDF), "question": QUESTION, "page": 2, "fit": "pad"}
    said = (await http.post("/v1/vqa", json=asked)).json()
    assert (said["vision"]["fit"], house.vision.calls) == ("pad", ["see"])
    assert shades(house) == pytest.approx([GREY * 2 / 3], abs=1)  # two thirds of the square are padding
    known = (await http.post("/v1/vqa/estimate", json=asked)).json()["images"][0]
    assert (known["known"], known["width"]) == (True, None)
    other = (await http.post("/v1/vqa/estimate", json=asked | {"page": 1})).json()
    assert other["images"][0]["known"] is False
    assert other["cost"]["pixels"] == house.settings.max_image_pixels
    assert house.admission.quota.held.pixels == 0


async def test_a_tile_of_a_page_is_looked_at(house, http):
    tall = pdf([Page(b""), Page(b"0 g 0 0 100 100 re f", (0, 0, 100, 300))])  # white, and black at the bottom
    house.vision.map[:] = 0
    house.vision.map[12:] = 0.9
    asked = {"image": in_base64(tall), "question": QUESTION, "page": 2, "fit": "tiles"}
    said = (await http.post("/v1/vqa", json=asked)).json()
    assert (said["vision"]["fit"], house.vision.calls) == ("tiles", ["see", "see"])
    assert shades(house)[-1] < 10


async def test_without_the_extra_a_pdf_is_refused(monkeypatch, http):
    monkeypatch.setattr(formats, "HAS_PDFIUM", False)
    response = await http.post("/v1/vqa", json={"image": in_base64(PDF), "question": QUESTION, "page": 2})
    assert response.status_code == 400
    assert "pip install -c constraints.txt -e '.[pdf]'" in response.json()["error"]["message"]
    assert (await http.post("/v1/images", content=PDF)).status_code == 400


async def test_hostile_pdfs_are_refused_as_such(http):
    small = filled((1, 2, 3))
    for data, says in ((b"%PDF-1.4", "damaged"), (pdf([]), "no pages"), (pdf([small], b"/Encrypt 1 0 R"), "")):
        response = await http.post("/v1/images", content=data)
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]
