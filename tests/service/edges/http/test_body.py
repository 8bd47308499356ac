"""A body on its way in: how it is packed, how fast it comes, and what stands before its JSON."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from service.admission.quota import Cost
from service.core.errors import InvalidRequest
from service.edges.http.application import http_api
from service.edges.http.body import parse_form
from tests.service.edges.http.test_vqa import ASKED, Caller, fault
from tests.support.fakes import House, png

QUESTION = json.dumps(ASKED).encode()
LIMIT = 100_000


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(max_image_bytes=LIMIT))
    yield caller
    assert caller.house.admission.quota.held == Cost()
    await caller.close()


def packed(encoding: str) -> dict[str, str]:
    return {"content-encoding": encoding, "content-type": "application/json"}


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", " gzip "])
async def test_gzip_is_unpacked(caller, encoding):
    response = await caller.http.post("/v1/vqa", content=gzip.compress(QUESTION), headers=packed(encoding))
    assert response.json()["answer"] == "red"


async def test_gzip_is_unpacked_however_it_is_cut(caller):
    data = gzip.compress(png() + os.urandom(50_000))

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    for size in (1, 999, 65536):
        response = await caller.http.post("/v1/images", content=pieces(size), headers={"content-encoding": "gzip"})
        assert response.json()["bytes"] == len(png()) + 50_000


async def test_identity_is_no_encoding(caller):
    assert (await caller.http.post("/v1/vqa", content=QUESTION, headers=packed("identity"))).status_code == 200


@pytest.mark.parametrize("encoding", ["zstd", "br", "deflate", "gzip, gzip", "x" * 3000])
async def test_any_other_encoding_is_refused_by_name(caller, encoding):
    response = await caller.http.post("/v1/vqa", content=QUESTION, headers=packed(encoding))
    error = fault(response, 415)
    assert (error["code"], error["param"]) == ("unsupported_encoding", "content-encoding")
    assert encoding[:30] in error["message"]
    assert len(error["message"]) < 200
    assert response.headers["accept-encoding"] == "gzip"


BROKEN = {
    "no gzip": (QUESTION, "is not gzip data"),
    "zlib": (zlib.compress(QUESTION), "is not gzip data"),
    "cut": (gzip.compress(QUESTION)[:-1], "ends before"),
    "nothing": (b"", "ends before"),
    "more behind": (gzip.compress(QUESTION) + b"more", "goes on"),
    "a wrong checksum": (gzip.compress(QUESTION)[:-8] + bytes(8), "is not gzip data"),
}


@pytest.mark.parametrize(("body", "said"), BROKEN.values(), ids=BROKEN)
async def test_broken_gzip_is_refused(caller, body, said):
    error = fault(await caller.http.post("/v1/vqa", content=body, headers=packed("gzip")), 400)
    assert error["code"] == "invalid_encoding"
    assert said in error["message"]


@pytest.mark.parametrize("size", [LIMIT + 1, 100_000_000])
async def test_gzip_becomes_no_more_than_a_body_may_be(caller, size):
    """A gigabyte of zeros is a megabyte of gzip: it ends at the limit, not at its end."""
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(max(1, size // 1_000_000)))
    bomb = gzip.compress(bytes(size)) if size < 1_000_000 else bomb + packer.flush()
    response = await caller.http.post("/v1/images", content=bomb[:LIMIT], headers={"content-encoding": "gzip"})
    assert "is too large" in fault(response, 413)["message"]


async def test_gzip_that_is_empty_inside_is_bounded_too(caller):
    async def empty_blocks() -> AsyncIterator[bytes]:
        yield gzip.compress(b"")[:10]
        while True:
            yield b"\x00\x00\x00\xff\xff" * 1000

    response = await caller.http.post("/v1/images", content=empty_blocks(), headers={"content-encoding": "gzip"})
    assert "is too large" in fault(response, 413)["message"]


async def test_gzip_is_reserved_as_it_is_unpacked():
    caller = Caller(House(max_image_bytes=LIMIT, max_bytes_in_flight=2_000_000))
    caller.house.admission.quota.reserve(Cost(nbytes=1_450_000), "", 0.0)
    response = await caller.http.post(
        "/v1/images", content=gzip.compress(bytes(90_000)), headers={"content-encoding": "gzip"}
    )
    assert fault(response, 429)["code"] == "saturated"
    await caller.close()


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf" + QUESTION, b"\xef\xbb\xbf\n " + QUESTION])
async def test_a_byte_order_mark_before_json_is_skipped(caller, body):
    assert (await caller.post(body)).json()["answer"] == "red"


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf" + QUESTION, b"\xff\xfe" + QUESTION])
async def test_other_marks_are_no_json(caller, body):
    assert fault(await caller.post(body), 400)["code"] == "invalid_json"


# How fast it comes.
@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/images"])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_drips_is_given_up_before_the_time_for_a_whole_one(path, declared):
    house = House(body_timeout_s=60)
    caller = Caller(house)
    limits = replace(house.edge.bodies, grace_s=0.2, min_bytes_per_s=1000)
    caller.http._transport.app = http_api(replace(house.edge, bodies=limits))

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b"a"
            await asyncio.sleep(0.01)

    headers = {"content-length": "100000"} if declared else {}
    async with asyncio.timeout(5):
        response = await caller.http.post(path, content=drip(), headers=headers)
    assert fault(response, 408)["code"] == "slow_body"
    assert response.headers["connection"] == "close"
    assert house.admission.quota.held == Cost()
    await caller.close()


async def test_a_body_at_the_least_rate_may_go_on():
    house = House(body_timeout_s=60)
    caller = Caller(house)
    limits = replace(house.edge.bodies, grace_s=0.2, min_bytes_per_s=1000)
    caller.http._transport.app = http_api(replace(house.edge, bodies=limits))

    async def slowly() -> AsyncIterator[bytes]:
        data = png() + bytes(2000)
        for start in range(0, len(data), 100):
            yield data[start : start + 100]
            await asyncio.sleep(0.02)

    assert (await caller.http.post("/v1/images", content=slowly())).status_code == 200
    await caller.close()


BOUNDARY = "glimpse"
PART = b'content-disposition: form-data; name="question"\r\n\r\nwhat?'


def form_of(*parts: bytes, after: bytes = b"\r\n") -> bytes:
    return b"--glimpse\r\n" + (b"\r\n--glimpse" + after).join(parts) + b"\r\n--glimpse--\r\n"


def in_pieces(body: bytes, size: int = 65_536) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form_of(PART, PART, after=b" " * 20_000_000 + b"\r\n"), "more than 64 blanks after a boundary"),
        (form_of(PART)[:-4] + b"\t" * 20_000_000, "more than 64 blanks after a boundary"),
        (form_of(PART + b"\r\n--glimpsex" * 2_000_000), "more than 64 parts"),
        (form_of(PART + b"\r\n--glimpse-x" * 2_000_000), "more than 64 parts"),
        (form_of(PART + b"\r\n--glimpse\rx" * 2_000_000), "more than 64 parts"),
        (form_of(*[PART] * 65), "more than 64 parts"),
    ],
    ids=["padding", "padding without end", "longer", "almost the last", "almost a boundary", "parts"],
)
async def test_a_form_costs_little_whatever_stands_where_a_boundary_may(body, said):
    started = time.process_time()
    with pytest.raises(InvalidRequest, match=said):
        await parse_form(in_pieces(body), f"multipart/form-data; boundary={BOUNDARY}")
    assert time.process_time() - started < 1


@pytest.mark.parametrize("size", [1, 7, 64, 100])
async def test_boundaries_are_counted_however_the_body_is_cut(size):
    """Whoever sends it, and whatever carries it, cuts it anywhere."""
    almost = form_of(PART + b"\r\n--glimpsex" * 128)
    for body, said in ((almost, "64 parts"), (form_of(PART, PART, after=b" " * 65 + b"\r\n"), "64 blanks")):
        with pytest.raises(InvalidRequest, match=said):
            await parse_form(in_pieces(body + bytes(200), size), f"multipart/form-data; boundary={BOUNDARY}")
    few = form_of(PART + b"\r\n--glimpsex" * 126)
    (part,) = await parse_form(in_pieces(few, size), f"multipart/form-data; boundary={BOUNDARY}")
    assert part.data.count(b"glimpsex") == 126


async def test_a_boundary_may_have_some_padding():
    form = in_pieces(form_of(*[PART] * 64, after=b" \t" * 32 + b"\r\n"))
    parts = await parse_form(form, f"multipart/form-data; boundary={BOUNDARY}")
    assert [bytes(part.data) for part in parts] == [b"what?"] * 64
