"""Each question ends in one outcome, and what the objectives read counts only what the service is to blame for."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator

import httpx
import pytest

from service.admission.quota import Refusal
from service.core.errors import DeadlineExceeded, Overloaded, QuotaExceeded
from service.core.request import Sampling, Text
from service.edges.asking import QuestionLimits
from service.edges.http.application import http_api
from tests.support.fakes import House, answered, image_source, png, until
from tests.support.fakes import asked as request


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.reader.close()


def first_tokens(house: House) -> float:
    return house.counted("glimpse_time_to_first_token_seconds_count", variant="default")


def refusals(house: House, reason: str) -> float:
    return house.counted("glimpse_refusals_total", reason=reason)


async def test_only_a_streamed_answer_has_a_time_to_its_first_token(house: House) -> None:
    await answered(house, request(sampling=Sampling(max_tokens=16, streaming=False)))
    assert first_tokens(house) == 0
    assert house.counted("glimpse_stage_seconds_count", stage="generate") == 1
    await answered(house, request())
    assert first_tokens(house) == 1
    assert house.counted("glimpse_e2e_request_latency_seconds_count", variant="default") == 2


async def test_with_a_first_token_budget_every_answer_is_streamed_from_the_llm() -> None:
    urls = {"vision_url": "127.0.0.1:1", "llm_url": "127.0.0.1:1"}
    house = House(first_token_budget_ms=500, **urls)
    await answered(house, request(sampling=Sampling(max_tokens=16, streaming=False)))
    assert first_tokens(house) == 1
    assert house.counted("glimpse_stage_seconds_count", stage="prefill") == 1
    house.reader.close()


@pytest.mark.parametrize(("is_hurried", "outcome"), [(True, "short_deadline"), (False, "deadline_exceeded")])
async def test_a_deadline_that_the_caller_made_short_counts_apart(house: House, is_hurried: bool, outcome: str) -> None:
    house.language.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await answered(house, request(timeout_s=0.05, is_hurried=is_hurried))
    assert house.outcomes() == {outcome: 1}
    assert house.counted("glimpse_tokens_saved_total", reason=outcome) == 16


@pytest.mark.parametrize(("is_hurried", "reason"), [(True, "short_deadline"), (False, "deadline")])
async def test_a_refusal_for_such_a_deadline_counts_apart(is_hurried: bool, reason: str) -> None:
    house = House(vision_slots=1)
    house.vision.close("see")
    first = asyncio.create_task(answered(house, request(id="vqa_0")))
    await until(lambda: house.vision.calls)
    image = image_source(png((1, 2, 3)))
    late = request(id="vqa_1", parts=(image, Text("?")), timeout_s=20, is_hurried=is_hurried)
    needed_s = house.admission.scheduler._needed_s
    house.admission.scheduler._needed_s = lambda _: 100.0
    with pytest.raises(Overloaded) as caught:
        await answered(house, late)
    house.admission.scheduler._needed_s = needed_s
    house.vision.gate.set()
    await first
    assert (caught.value.code, refusals(house, reason)) == ("deadline", 1)
    assert refusals(house, "deadline") + refusals(house, "short_deadline") == 1
    assert house.outcomes() == {"ok": 1, reason: 1}
    house.reader.close()


@pytest.mark.parametrize(("timeout_s", "is_short"), [(1, True), (26.9, True), (29.9, False), (30, False), (60, False)])
def test_short_is_what_is_below_the_default_for_whatever_a_deadline_loses_on_its_way(
    timeout_s: float, is_short: bool
) -> None:
    limits = QuestionLimits(max_question_chars=100, default_timeout_s=30, max_timeout_s=120)
    assert limits.is_short(timeout_s) is is_short


async def posted(house: House, path: str, body: object) -> httpx.Response:
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        return await http.post(path, json=body)


def question(**fields: object) -> dict[str, object]:
    return {"image": base64.b64encode(png()).decode(), "question": "what colour?", **fields}


async def test_a_body_with_a_short_timeout_is_hurried(house: House) -> None:
    house.language.gate.clear()
    response = await posted(house, "/v1/vqa", question(timeout_s=0.05))
    assert response.status_code == 504
    assert house.outcomes() == {"short_deadline": 1}


async def test_a_question_of_a_batch_that_waits_for_room_has_one_outcome() -> None:
    house = House()
    quota = house.admission.quota
    refusal = quota.refusal

    def full_once(*given: object, **more: object) -> Refusal | None:
        if len(house.admission.batch_turns) and not refusals(house, "batch_wait"):
            return Refusal("saturated", "full", 0.01)
        return refusal(*given, **more)

    quota.refusal = full_once
    response = await posted(house, "/v1/vqa/batch", [question()])
    assert json.loads(response.text)["answer"] == "red"
    assert (refusals(house, "batch_wait"), refusals(house, "saturated")) == (1, 0)
    assert house.outcomes() == {"ok": 1}
    house.reader.close()


@pytest.mark.parametrize("refusal", [Overloaded, QuotaExceeded])
async def test_a_question_of_a_batch_that_is_refused_at_work_has_one_outcome(
    house: House, refusal: type[Overloaded]
) -> None:
    model, tries = house.pipeline.models.models[0], []
    look = model.vision_stage.look

    async def refused_twice(*given: object) -> object:
        tries.append(1)
        if len(tries) < 3:
            raise refusal("full", retry_after_s=0.01)
        return await look(*given)

    model.vision_stage.look = refused_twice
    response = await posted(house, "/v1/vqa/batch", [question()])
    assert json.loads(response.text)["answer"] == "red"
    assert len(tries) == 3
    assert house.outcomes() == {"ok": 1}


async def test_the_last_refusal_of_a_question_of_a_batch_counts(house: House) -> None:
    house.pipeline.models.models[0].vision_stage.look = refused_for_long
    response = await posted(house, "/v1/vqa/batch", [question()])
    assert json.loads(response.text)["status"] == 429
    assert house.outcomes() == {"overloaded": 1}


async def refused_for_long(*_: object) -> object:
    raise Overloaded("full", retry_after_s=300)


async def test_a_question_that_has_its_turn_after_the_batch_ended_is_counted() -> None:
    house = House(batch_timeout_s=0.05)
    house.language.gate.clear()
    await posted(house, "/v1/vqa/batch", [question()] * 10)
    assert house.outcomes() == {"deadline_exceeded": 10}
    house.reader.close()
