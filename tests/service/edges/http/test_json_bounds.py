"""What a body may hold besides its images is bounded before any object is made of it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import GlimpseError, InvalidImage, InvalidRequest
from service.core.request import ImageBytes
from service.edges.http.json_bounds import split
from service.edges.http.schema import VqaRequest
from service.edges.http.vqa import parse_json
from service.edges.image_text import Base64, source_of
from tests.service.edges.http.test_vqa import Caller, fault
from tests.support.fakes import CLOSER, House, cancelled, png

CHARS = 2000
MILLION = 1_000_000
FILLER = png() + bytes(3 * MILLION)  # bytes behind a PNG's end are not read
IMAGE = base64.b64encode(FILLER).decode()


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(CLOSER))
    yield caller
    await caller.close()


def body(text: str) -> bytes:
    return b'{"question": "what colour?", "image": "img_1", ' + text.encode() + b"}"


# Made when they are used: pytest looks through its parameters.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "unknown keys": lambda: body(",".join(f'"{number:x}": 1' for number in range(MILLION))),
    "one unknown key": lambda: body('"x": "' + "a" * 20 * MILLION + '"'),
    "a long name": lambda: body('"' + "x" * 20 * MILLION + '": 1'),
    "a known name, too long": lambda: body('"question": "' + "x" * 20 * MILLION + '"'),
    "lists": lambda: body('"turns": [' + "[]," * MILLION + "[]]"),
    "objects": lambda: body('"turns": [' + "{}," * MILLION + "{}]"),
    "few objects": lambda: body('"turns": [' + "{}," * 20_000 + "{}]"),
    "nested lists": lambda: body('"turns": ' + "[" * MILLION + "]" * MILLION),
    "numbers": lambda: body('"stop": [' + "1," * MILLION + "1]"),
    "one number": lambda: body('"seed": ' + "1" * 20 * MILLION),
    "strings": lambda: body('"stop": [' + '"",' * MILLION + '""]'),
    "images": lambda: body('"images": [' + '"",' * MILLION + '""]'),
    "images in an object": lambda: body('"images": {' + '"a": "",' * MILLION + '"b": ""}'),
    "image as a list": lambda: body('"image": [' + '"aaaa",' * MILLION + '""]'),
    "image further in": lambda: body('"budget": {"image": "' + "a" * 20 * MILLION + '"}'),
    "escaped quotes": lambda: body('"image": "' + '\\"' * MILLION + '"'),
    "white space": lambda: body(" " * 20 * MILLION),
    "strings without commas": lambda: body('""' * MILLION),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_not_an_image_is_refused_quickly_and_without_memory(name):
    hostile = HOSTILE[name]()
    tracemalloc.start()
    started = time.thread_time()
    with pytest.raises(GlimpseError):
        await split(hostile, CHARS, VqaRequest.model_fields)
    took_s = time.thread_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 0.5  # under tracemalloc; 5 ms without
    assert peak < len(hostile) // 10 + 500_000


@pytest.mark.parametrize("name", ["unknown keys", "one unknown key", "objects", "strings", "white space"])
async def test_the_route_refuses_it(caller, name):
    response = await caller.post(HOSTILE[name]())
    status = 400 if "unknown" in name else 413
    assert fault(response, status)["code"] == ("unknown_field" if "unknown" in name else "too_large")


async def test_a_large_image_under_a_wrong_name_is_told_the_right_one(caller):
    response = await caller.post(json.dumps({"question": "q", "imag": IMAGE}).encode())
    error = fault(response, 400)
    assert error["message"] == "there is no field 'imag': did you mean image?"
    assert error["param"] == "imag"


@pytest.mark.parametrize(
    "fields",
    [
        {"image": IMAGE},
        {"images": [IMAGE, IMAGE]},
        {"image": IMAGE, "turns": [{"question": "what is it?", "answer": 'a "red" square\\'}] * 9},
        {"image": IMAGE, "stop": ['"', "\\", "]", "}"]},
        {"images": [IMAGE[: 4 * 900]] * 64},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
async def test_honest_bodies_pass(caller, fields, indent):
    data = json.dumps({"question": "what colour?", "max_tokens": 3} | fields, indent=indent).encode()
    await split(data, CHARS, VqaRequest.model_fields)
    await split(data.replace(b"/", b"\\/"), CHARS, VqaRequest.model_fields)  # as PHP writes base64


@pytest.mark.parametrize("character", ['"', "\\", "\n", "é", "\U0001f600", ",", "{"])
async def test_the_longest_question_passes_whatever_it_holds(character):
    turns = [{"question": character * 10, "answer": character * 10}] * 64
    data = json.dumps({"question": character * (CHARS - 1280), "turns": turns, "image": IMAGE}).encode()
    await split(data, CHARS, VqaRequest.model_fields)


async def test_a_large_image_is_answered(caller):
    assert (await caller.ask(image=IMAGE)).json()["answer"] == "red"


@pytest.mark.parametrize("name", ["unknown keys", "one unknown key"])
async def test_the_first_unknown_key_ends_it_before_the_rest_is_looked_at(name):
    hostile, took_s = HOSTILE[name](), []
    for _ in range(5):  # a busy machine may take some of the time
        began = time.thread_time()
        with pytest.raises(InvalidRequest) as caught:
            await split(hostile, CHARS, VqaRequest.model_fields)
        took_s.append(time.thread_time() - began)
        assert caught.value.code == "unknown_field"
        assert caught.value.param in ("0", "x")
    assert min(took_s) < 0.002


async def test_an_unknown_key_is_told_with_what_it_may_mean_however_large_the_body_is(caller):
    for image in (base64.b64encode(png()).decode(), IMAGE):
        error = fault(await caller.post(json.dumps({"question": "q", "file": image}).encode()), 400)
        assert error["message"] == "there is no field 'file': did you mean image?"


async def test_a_list_is_no_object_and_an_escaped_name_is_its_meaning(caller):
    listed = json.dumps(["x" * 3000, "y"]).encode()
    assert fault(await caller.post(listed), 400)["message"] == "the body must be a JSON object"
    escaped = b'{"question": "q", "im\\u0061ge": "%s"}' % base64.b64encode(png() + bytes(3000))
    assert (await caller.post(escaped)).json()["answer"] == "red"


def written(data: bytes, way: str) -> bytes:
    """Base64 of the data inside JSON, as different writers put it."""
    text = base64.b64encode(data).decode()
    return {
        "plain": text,
        "data URL": "data:image/png;base64," + text,
        "as PHP": text.replace("/", "\\/"),
        "data URL as PHP": "data:image\\/png;base64," + text.replace("/", "\\/"),
        "for URLs": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "wrapped": base64.encodebytes(data).decode().replace("\n", "\\n"),
        "wrapped with returns": base64.encodebytes(data).decode().replace("\n", "\\r\\n"),
        "every character escaped": "".join(f"\\u{ord(character):04x}" for character in text),
        "blanks around": " \\t" + text + "\\n ",
    }[way].encode()


WAYS = ("plain", "data URL", "as PHP", "data URL as PHP", "for URLs", "wrapped", "wrapped with returns",
        "every character escaped", "blanks around")  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1000, 98_303, 98_304, 98_305, 300_001])
async def test_a_large_image_is_read_as_it_was_written(way, size):
    """Whatever the slices cut."""
    data = random.Random(size).randbytes(size)
    body = b'{"question": "q", "image": "' + written(data, way) + b'"}'
    _, fields = await parse_json(body, CHARS)
    found = fields.image if isinstance(fields.image, ImageBytes) else source_of(fields.image)
    assert found.data == data


async def test_large_images_keep_their_places_among_small_ones():
    data = [bytes([number]) * (5000 if number % 2 else 10) for number in range(6)]
    images = [base64.b64encode(each).decode() for each in data]
    _, fields = await parse_json(json.dumps({"images": images, "question": "q"}).encode(), CHARS)
    assert [(image if isinstance(image, ImageBytes) else source_of(image)).data for image in fields.images] == data


@pytest.mark.parametrize(
    ("wrong", "place", "told"),
    [(b"!", 200_000, "its character 200,001 is '!'"), ("é".encode(), 200_000, "its character 200,001 is 'é'"),
     (b"=", 131_071, "its character 131,072 is '='"), (b"=", 131_072, "its character 131,073 is '='"),
     (b"\\\\", 200_000, "its character 200,001 is '\\\\'")],
)  # fmt: skip
async def test_the_wrong_character_of_a_large_image_is_named(caller, wrong, place, told):
    image = b"A" * place + wrong + b"A" * (400_000 - place - 1)
    error = fault(await caller.post(b'{"question": "q", "images": ["%s", "%s"]}' % (b"A" * 4000, image)), 400)
    assert (error["code"], error["param"]) == ("invalid_image", "images.1")
    assert error["message"].startswith("image 2 of 2: ")
    assert told in error["message"]


async def test_too_few_digits_of_a_large_image_are_told(caller):
    error = fault(await caller.post(b'{"question": "q", "image": "%s"}' % (b"A" * 400_001)), 400)
    assert "400,001 characters are one too many or end too early" in error["message"]


@pytest.mark.parametrize("raw", [b"\n", b"\t", b"\r"])
async def test_raw_line_breaks_are_no_json_in_a_large_image_either(caller, raw):
    for length in (100, 400_000):
        error = fault(await caller.post(b'{"question": "q", "image": "%sAAA"}' % (b"A" * length + raw)), 400)
        assert error["code"] == "invalid_json"


@given(st.binary(max_size=30), st.integers(1, 8), st.booleans())
def test_base64_is_decoded_wherever_it_is_cut(data, size, padded):
    text = base64.encodebytes(data)
    text = text if padded else text.replace(b"=", b"")
    decoder = Base64(0)
    for start in range(0, len(text), size):
        decoder.feed(text[start : start + size])
    assert b"".join(decoder.end()) == data


@given(st.text(alphabet="AB=-/+ \n!é", max_size=12), st.integers(1, 5))
def test_what_is_wrong_is_named_wherever_it_is_cut(text, size):
    told = []
    for step in (size, len(text) + 1):
        decoder = Base64(0)
        try:
            for start in range(0, len(text), step):
                decoder.feed(text[start : start + step].encode())
            told.append(b"".join(decoder.end()))
        except InvalidImage as error:
            told.append(error.message if text.isascii() else "wrong")
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["JSON", "form", "form with text", "upload"])
async def test_a_body_of_the_largest_size_holds_up_nobody(kind):
    """Counted in CPU seconds of this thread between two turns of the loop, so that a busy machine does not matter."""
    caller = Caller(House(CLOSER))
    data = png() + bytes(19_000_000)
    text = base64.b64encode(data)
    boundary = b'--b\r\ncontent-disposition: form-data; name="'
    form = boundary + b'question"\r\n\r\nq\r\n' + boundary + b'image"%s\r\n\r\n%s\r\n--b--\r\n'
    body, content_type, path = {
        "JSON": (b'{"question": "q", "image": "' + text + b'"}', "application/json", "/v1/vqa"),
        "form": (form % (b'; filename="x.png"', data), "multipart/form-data; boundary=b", "/v1/vqa"),
        "form with text": (form % (b"", text), "multipart/form-data; boundary=b", "/v1/vqa"),
        "upload": (data, "image/png", "/v1/images"),
    }[kind]

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    turns: list[float] = []

    async def watch() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - before)

    watching = asyncio.create_task(watch())
    response = await caller.http.post(path, content=pieces(), headers={"content-type": content_type})
    await cancelled(watching)
    assert response.status_code == 200, response.text
    assert sorted(turns)[-3] < 0.005  # two may be the garbage collector's
    await caller.close()


@pytest.mark.parametrize("name", ["turns", "budget", "question", "stop", "zzz"])
async def test_a_forms_text_is_small(caller, name):
    text = "[" + "{}," * 20_000 + "{}]" if name in ("turns", "budget") else "a" * 200_000
    fields = {"question": "what colour?"} | {name: text}
    response = await caller.http.post("/v1/vqa", data=fields, files={"image": ("x.png", png())})
    assert fault(response, 413)["code"] == "too_large"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(sorted(VqaRequest.model_fields)), json_values), st.booleans())
def test_any_small_json_passes(fields, escaped):
    data = json.dumps({"image": "a" * 5000} | fields, ensure_ascii=escaped).encode()
    asyncio.run(split(data, CHARS, VqaRequest.model_fields))


@given(st.binary(max_size=200))
def test_any_small_bytes_pass_or_are_refused(data):
    """Nothing else is raised."""
    try:
        asyncio.run(split(data * 100, CHARS, VqaRequest.model_fields))
    except GlimpseError:
        assert len(data) * 100 > 2048
