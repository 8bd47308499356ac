"""POST /v1/vqa/batch: many questions, each result as a line as soon as it is there."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.admission.admission import Admission, Reservation, Size
from service.admission.quota import Cost
from service.admission.scheduler import Resource
from service.core.errors import Overloaded, Unavailable
from service.core.request import Priority
from service.edges.http.application import http_api
from service.edges.http.batch_schema import BatchLine, BatchQuestion
from service.edges.http.json_bounds import items
from tests.support.fakes import House, cancelled, png, until
from tests.support.keys import Keys, bearer
from tests.support.paths import SCENES
from tests.support.servers import Gateway

IMAGE, OTHER = (base64.b64encode(png(colour)).decode() for colour in ((200, 30, 40), (1, 2, 3)))


class Caller:
    """An HTTP client of a service without Triton."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.app = http_api(house.edge)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost")

    async def send(self, body: bytes, kind: str = "application/jsonl", **headers: str) -> httpx.Response:
        return await self.http.post("/v1/vqa/batch", content=body, headers={"content-type": kind, **headers})

    async def ask(self, *questions: object, **headers: str) -> dict[int, dict[str, Any]]:
        """Results by their index; each index comes once."""
        response = await self.send(json.dumps(questions).encode(), "application/json", **headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/jsonl"
        return by_index(response.text)


def by_index(text: str) -> dict[int, dict[str, Any]]:
    results = [json.loads(line) for line in text.splitlines()]
    for result in results:
        BatchLine.model_validate(result)
    assert max(Counter(result["index"] for result in results).values()) == 1
    return {result["index"]: result for result in results}


def asked(question: str = "what colour?", image: str = IMAGE, **fields: object) -> dict[str, object]:
    return {"image": image, "question": question, **fields}


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(max_image_bytes=100_000, max_batch_questions=40))
    yield caller
    await caller.http.aclose()
    caller.house.reader.close()


def holds_nothing(house: House) -> bool:
    admission = house.admission
    return (
        admission.quota.held == Cost()
        and not any(map(admission.scheduler.used, Resource))
        and not len(admission.batch_turns)
    )


async def test_every_question_is_answered_by_its_index(caller):
    results = await caller.ask(asked(), asked(image=OTHER), asked("which shape?", explain=True))
    assert sorted(results) == [0, 1, 2]
    assert {result["answer"] for result in results.values()} == {"red"}
    assert "relevance" not in results[0]
    assert len(results[2]["relevance"]) == 1
    assert holds_nothing(caller.house)


async def test_each_response_has_headers_of_its_own(caller):
    for number in range(3):
        response = await caller.send(b"{}", **{"x-request-id": f"mine-{number}"})
        assert response.headers.get_list("x-request-id") == [f"mine-{number}"]


async def test_questions_about_one_image_share_its_encode(caller):
    questions = [asked(f"question {number}?", image) for number in range(10) for image in (IMAGE, OTHER)]
    results = await caller.ask(*questions)
    assert len(results) == 20
    assert caller.house.vision.calls.count("see") == 2
    assert Counter(result["vision"]["cache"] for result in results.values())["miss"] == 2


async def test_a_question_that_fails_leaves_the_others_alone(caller):
    wrong = [
        asked(image="img_" + 32 * "0"),
        asked(colour="red"),
        asked(question=" "),
        asked(stream=True),
        "a text",
        asked(image=base64.b64encode(b"hello").decode()),
        asked(max_tokens="16"),
    ]
    results = await caller.ask(asked(), *wrong, asked("which shape?"))
    assert [results[number]["answer"] for number in (0, 8)] == ["red", "red"]
    faults = [(results[number]["status"], results[number]["error"]["code"]) for number in range(1, 8)]
    assert faults == [
        (404, "image_not_found"),
        (400, "unknown_field"),
        (400, "invalid_request"),
        (400, "invalid_request"),
        (400, "invalid_request"),
        (400, "invalid_image"),
        (400, "invalid_request"),
    ]
    assert results[4]["error"] == {
        "message": "stream must be false: a batch sends each answer whole; it is true",
        "type": "invalid_request_error",
        "param": "stream",
        "code": "invalid_request",
    }
    assert holds_nothing(caller.house)


async def test_an_unknown_fault_is_one_result_and_is_logged(caller):
    caller.house.vision.fault = RuntimeError("boom")
    with capture_logs():
        results = await caller.ask(asked(), asked(image="!"))
    assert (results[0]["status"], results[1]["status"]) == (500, 400)
    assert "boom" not in results[0]["error"]["message"]


async def test_lines_may_be_empty_and_end_as_windows_ends_them(caller):
    line = json.dumps(asked()).encode()
    for body in (line, line + b"\n", b"\n\r\n" + line + b"\r\n\n", b"\xef\xbb\xbf" + line):
        assert sorted(by_index((await caller.send(body)).text)) == [0]
    assert sorted(by_index((await caller.send(line + b"\n" + line, "application/json")).text)) == [0, 1]


@pytest.mark.parametrize(
    ("fields", "priority"),
    [({}, Priority.LOW), ({"priority": None}, Priority.LOW), ({"priority": "normal"}, Priority.NORMAL)],
)
def test_low_priority_is_the_default(fields, priority):
    assert BatchQuestion.from_json(json.dumps(asked(**fields)).encode()).fields().priority is priority


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/jsonl", 400, "missing_field"),
        (b"[]", "application/json", 400, "missing_field"),
        (b" [ ] ", "application/json", 400, "missing_field"),
        (b"[{}", "application/json", 400, "invalid_json"),
        (b'[{"a": "b]}', "application/json", 400, "invalid_json"),
        (b"[{}] {}", "application/json", 400, "invalid_json"),
        (b"x=1", "application/x-www-form-urlencoded", 400, "unsupported_content_type"),
        (png(), "application/json", 400, "unsupported_content_type"),
        (b"{}\n" * 41, "application/jsonl", 413, "too_large"),
        (b"\n" * 1_000, "application/jsonl", 413, "too_large"),
        (b"[" + b"{}," * 40 + b"{}]", "application/json", 413, "too_large"),
        (b"[" * 10_000, "application/json", 413, "too_large"),
        (b'["' + b'","' * 10_000 + b'"]', "application/json", 413, "too_large"),
        (b"x" * 2_000_000, "application/jsonl", 413, "too_large"),
    ],
)
async def test_a_batch_that_cannot_be_read_is_refused_whole(caller, body, kind, status, code):
    response = await caller.send(body, kind)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert not caller.house.vision.calls


async def test_as_many_questions_as_allowed_are_taken(caller):
    line = json.dumps(asked(image="!")).encode()
    assert len(by_index((await caller.send(b"\n".join([line] * 40))).text)) == 40
    assert len(by_index((await caller.send(b"\n".join([line] * 40) + b"\n")).text)) == 40
    assert len(await caller.ask(*[asked(image="!")] * 40)) == 40


async def test_a_batch_takes_a_part_of_the_rows_and_the_tenants_other_questions_pass(caller):
    caller.house.language.gate.clear()
    batches = [asyncio.create_task(caller.ask(*[asked()] * 20, **{"x-tenant-id": "acme"})) for _ in range(2)]
    await until(lambda: caller.house.language.open == caller.house.pipeline.batch_turns)
    other = asyncio.create_task(caller.ask(asked(), **{"x-tenant-id": "other"}))
    single = asyncio.create_task(caller.http.post("/v1/vqa", json=asked(), headers={"x-tenant-id": "acme"}))
    await until(lambda: caller.house.language.open == caller.house.pipeline.batch_turns + 2)
    caller.house.language.gate.set()
    assert len(await other) == 1
    assert (await single).status_code == 200
    assert [len(await batch) for batch in batches] == [20, 20]
    assert holds_nothing(caller.house)


class Full(Admission):
    """Has no room for the first two questions of the batch."""

    opened = 0
    retry_after_s = 0.01

    @contextmanager
    def reservation(
        self, tenant: str, size: Size | None = None, within: Reservation | None = None
    ) -> Iterator[Reservation]:
        self.opened += 1
        if self.opened in (2, 3):  # the first is of the batch itself
            raise Overloaded("full", retry_after_s=self.retry_after_s)
        with super().reservation(tenant, size, within) as reservation:
            yield reservation


class FullForLong(Full):
    retry_after_s = 60.0  # longer than a question has time


@pytest.mark.parametrize(("admission", "tries", "statuses"), [(Full, 6, [200] * 3), (FullForLong, 4, [429, 429, 200])])
async def test_a_refusal_for_want_of_room_is_tried_again_while_there_is_time(admission, tries, statuses):
    caller = Caller(House(admission=admission))
    results = await caller.ask(asked(), asked(), asked())
    assert [results[number].get("status", 200) for number in range(3)] == statuses
    assert caller.house.admission.opened == tries
    assert holds_nothing(caller.house)
    caller.house.reader.close()


async def test_what_is_left_when_the_time_is_over_is_told_for_each_question():
    caller = Caller(House(batch_timeout_s=0.05))
    caller.house.language.gate.clear()
    results = await caller.ask(*[asked()] * 10)
    assert [results[number]["error"]["code"] for number in range(10)] == ["deadline_exceeded"] * 10
    assert holds_nothing(caller.house)
    caller.house.reader.close()


async def test_a_caller_that_leaves_ends_the_rest(caller):
    caller.house.language.gate.clear()
    batch = asyncio.create_task(caller.ask(*[asked()] * 20))
    await until(lambda: caller.house.language.open == caller.house.pipeline.batch_turns)
    with capture_logs():
        await cancelled(batch)
    assert caller.house.language.open == 0
    assert holds_nothing(caller.house)


async def test_a_question_that_is_tried_again_counts_as_one_request(tmp_path: Path):
    keys = Keys(tmp_path)
    key = bearer(keys.make("acme"))
    caller = Caller(House(keys=str(keys.path), quota_requests_per_minute=100))
    model, tries = caller.house.pipeline.models.models[0], []
    look = model.vision_stage.look

    async def refused_twice(*given: object) -> object:
        tries.append(1)
        if len(tries) < 3:
            raise Overloaded("full", retry_after_s=0.01)
        return await look(*given)

    model.vision_stage.look = refused_twice
    before = await left(caller, key)
    body = json.dumps(asked()).encode()
    response = await caller.http.post(
        "/v1/vqa/batch", content=body, headers=key | {"content-type": "application/jsonl"}
    )
    assert by_index(response.text)[0]["answer"]
    assert len(tries) == 3
    assert before - await left(caller, key) == 3  # the batch, its question, and the request that tells what is left
    caller.house.reader.close()


async def left(caller: Caller, key: dict[str, str]) -> int:
    """Requests that are left of the quota, after this one."""
    response = await caller.http.post("/v1/vqa", json=asked(), headers=key)
    return int(response.headers["x-ratelimit-remaining-requests"])


async def test_a_batch_in_flight_is_answered_to_its_end_after_the_service_was_told_to_stop(caller):
    caller.house.language.gate.clear()
    batch = asyncio.create_task(caller.ask(*[asked()] * 20))
    await until(lambda: caller.house.language.open == caller.house.pipeline.batch_turns)
    caller.house.admission.stop()
    assert (await caller.http.post("/v1/vqa", json=asked())).status_code == 503
    caller.house.language.gate.set()
    results = await batch
    assert [results[number].get("status", 200) for number in range(20)] == [200] * 20
    assert holds_nothing(caller.house)


async def test_a_service_that_stops_says_so_at_the_end(caller):
    caller.house.language.gate.clear()
    batch = asyncio.create_task(caller.send(b"\n".join([json.dumps(asked()).encode()] * 10)))
    await until(lambda: caller.house.language.open == caller.house.pipeline.batch_turns)
    caller.house.admission.end()
    *results, end = [json.loads(line) for line in (await batch).text.splitlines()]
    assert {result["error"]["code"] for result in results} <= {"shutting_down"}
    assert (end["error"]["code"], "index" in end) == ("shutting_down", False)


async def test_a_model_that_is_gone_fails_each_question(caller):
    caller.house.language.fault = Unavailable("triton is gone")
    results = await caller.ask(asked(), asked())
    assert [results[number]["status"] for number in (0, 1)] == [503, 503]


@pytest.mark.parametrize(
    "value",
    [
        [{}],
        [{"a": '],}[{"\\', "b": [[1, {}], ","]}, {"image": "x" * 3_000}, 7, "text, and ]", None],
        [{"question": '\\"', "turns": [{"question": "[", "answer": "]"}]}] * 3,
        [[], [1, 2], {}],
    ],
    ids=range(4),
)
@pytest.mark.parametrize("indent", [None, 1])
async def test_the_items_of_a_list_are_found_without_parsing_it(value, indent):
    body = json.dumps(value, indent=indent).encode()
    found = await items(body, 10)
    assert [json.loads(body[start:end]) for start, end in found] == value


async def test_a_real_service_answers_a_batch_as_it_answers_each_alone(gateway: Gateway):
    scenes = [base64.b64encode((SCENES / f"new_{number:03}.webp").read_bytes()).decode() for number in (11, 12)]
    questions = [
        asked(question, scene)
        for scene in scenes
        for question in ("how many objects are there?", "describe the image.")
    ]
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False) as http:
        response = await http.post("/v1/vqa/batch", json=questions)
        alone = [(await http.post("/v1/vqa", json=each)).json()["answer"] for each in questions]
    assert [by_index(response.text)[number]["answer"] for number in range(4)] == alone
