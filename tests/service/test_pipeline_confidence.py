"""What the pipeline takes from the models to tell how sure an answer is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from service.core.answer import Delta, Finished
from service.core.errors import InvalidRequest
from service.core.request import Request
from tests.service.test_pipeline import answer, request
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD, House


@pytest.fixture
def house() -> Iterator[House]:
    house = House(replace(CARD, confidence=calibrated(CARD.vision_width)), visual_cache_bytes=1_000_000)
    yield house
    house.reader.close()


async def events(house: House, asked: Request) -> list[Delta | Finished]:
    return [event async for event in house.answer(asked)]


async def test_the_answers_own_log_probabilities_make_its_confidence(house):
    house.language.say("red or")
    *deltas, end = await events(house, request(question="what colour is the star?"))
    assert isinstance(end, Finished)
    assert end.confidence is not None
    assert house.language.sampling[-1].log_probs
    assert all(delta.log_probs == () for delta in deltas if isinstance(delta, Delta))  # they were not asked for
    house.language.say("red")
    *_, surer = await events(house, request(question="what colour is the star?"))
    assert isinstance(surer, Finished)
    assert surer.confidence is not None
    assert surer.confidence.value > end.confidence.value
    assert (end.abstained, end.abstain_reason) == (None, None)


async def test_asked_log_probabilities_come_with_the_text_and_the_confidence(house):
    asked = request()
    house.language.say("red or")
    *deltas, end = await events(house, replace(asked, sampling=replace(asked.sampling, log_probs=True)))
    assert [each.log_prob for delta in deltas if isinstance(delta, Delta) for each in delta.log_probs] == [
        0.0,
        -0.5,
        -1.0,
        -1.5,
    ]
    assert isinstance(end, Finished)
    assert end.confidence is not None


async def test_an_answer_below_the_least_confidence_is_given_and_abstains(house):
    text, end = await answer(house, request(min_confidence=1.0))
    assert text == "red"
    assert end.abstained is True
    assert end.abstain_reason is not None
    _, sure = await answer(house, request(min_confidence=0.0))
    assert (sure.abstained, sure.abstain_reason) == (False, None)


async def test_a_least_confidence_needs_a_calibrated_model():
    with pytest.raises(
        InvalidRequest, match=r"^tiny does not tell how sure it is .*leave min_confidence out$"
    ) as refused:
        await answer(House(), request(min_confidence=0.5))
    assert (refused.value.param, refused.value.code) == ("min_confidence", "confidence_not_supported")


async def test_a_repeat_from_the_visual_cache_is_as_familiar_as_before(house):
    _, first = await answer(house, request())
    _, again = await answer(house, request())
    assert house.vision.calls == ["see"]
    assert first.confidence is not None
    assert again.confidence is not None
    assert again.confidence.familiar == first.confidence.familiar
    assert not math.isclose(first.confidence.familiar, calibrated(4).familiar.of([0.0]))  # it was measured


async def test_a_model_that_is_not_calibrated_is_not_asked_for_log_probabilities():
    plain = House()
    _, end = await answer(plain, request())
    assert end.confidence is None
    assert not plain.language.sampling[-1].log_probs
    plain.reader.close()
