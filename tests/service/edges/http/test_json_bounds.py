"""What a body may hold besides its images is bounded before any object is made of it."""

from __future__ import annotations

import base64
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import GlimpseError
from service.edges.http.json_bounds import require_small
from service.edges.http.schema import VqaRequest
from tests.service.edges.http.test_vqa import Caller, fault
from tests.support.fakes import CLOSER, House, png

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
def test_what_is_not_an_image_is_refused_quickly_and_without_memory(name):
    hostile = HOSTILE[name]()
    tracemalloc.start()
    started = time.thread_time()
    with pytest.raises(GlimpseError):
        require_small(hostile, CHARS, VqaRequest.model_fields)
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
    require_small(data, CHARS, VqaRequest.model_fields)
    require_small(data.replace(b"/", b"\\/"), CHARS, VqaRequest.model_fields)  # as PHP writes base64


@pytest.mark.parametrize("character", ['"', "\\", "\n", "é", "\U0001f600", ",", "{"])
def test_the_longest_question_passes_whatever_it_holds(character):
    turns = [{"question": character * 10, "answer": character * 10}] * 64
    data = json.dumps({"question": character * (CHARS - 1280), "turns": turns, "image": IMAGE}).encode()
    require_small(data, CHARS, VqaRequest.model_fields)


async def test_a_large_image_is_answered(caller):
    assert (await caller.ask(image=IMAGE)).json()["answer"] == "red"


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
    require_small(data, CHARS, VqaRequest.model_fields)


@given(st.binary(max_size=200))
def test_any_small_bytes_pass_or_are_refused(data):
    """Nothing else is raised."""
    try:
        require_small(data * 100, CHARS, VqaRequest.model_fields)
    except GlimpseError:
        assert len(data) * 100 > 2048
