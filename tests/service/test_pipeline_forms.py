"""An answer in a form: one that is finished has its form, wherever a stop string or max_tokens may cut it."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.core.errors import InvalidRequest
from service.core.guide import guide_of
from service.core.request import Sampling
from service.text.spelling import Spelling
from tests.service.test_pipeline import answer, request
from tests.support.fakes import SPELLED, House, ids_of

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"type": "string", "maxLength": 12},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99}, "maxItems": 4},
    },
    "required": ["shape", "counts"],
    "additionalProperties": False,
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12)
DOCUMENTS = st.fixed_dictionaries({"shape": TEXT, "counts": st.lists(st.integers(-99, 99), max_size=4)})


@pytest.fixture(scope="module")
def said():
    """Ask a model that says a text, under a form and with stop strings -> the answer, and why it ended."""
    loop, house = asyncio.new_event_loop(), House()

    def ask(text: str, sampling: Sampling) -> tuple[str, str]:
        house.language.say(text)
        answered, end = loop.run_until_complete(answer(house, request(sampling=sampling)))
        return answered, end.finish_reason

    yield ask
    house.reader.close()
    loop.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS, st.data())
def test_a_finished_answer_parses_whatever_stops_it(said, document, data):
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 4))
    stops = [text[at : at + length] for at, length in data.draw(st.lists(places, max_size=3))]
    max_tokens = data.draw(st.integers(1, len(ids_of(text)) + 2))
    guide = guide_of(None, None, SCHEMA)
    answered, reason = said(text, Sampling(max_tokens=max_tokens, stop=tuple(stops), guide=guide))
    assert text.startswith(answered)
    if reason == "stop":
        assert json.loads(answered) == document
    else:
        assert answered != text or max_tokens <= len(ids_of(text))


@pytest.mark.parametrize(
    ("text", "stop", "answered", "reason"),
    [
        ("red, blue", [","], "red", "stop"),  # the form is whole before the stop string
        ("red, blue", ["b"], "red, ", "length"),
        ("red, blue", ["r"], "", "length"),
        ("red", ["q"], "red", "stop"),
        (" red, blue", [", "], "red", "stop"),
    ],
)
def test_a_form_that_a_stop_string_cut_is_finished_only_if_it_is_whole(said, text, stop, answered, reason):
    guide = guide_of(None, "[a-z]+(, [a-z]+)?", None)
    assert said(text, Sampling(max_tokens=32, stop=tuple(stop), guide=guide)) == (answered, reason)
    assert said(text, Sampling(max_tokens=32, stop=tuple(stop)))[1] == "stop"  # text without a form is whole anywhere


@pytest.mark.parametrize(("field", "value"), [("json_schema", SCHEMA), ("choices", ["a", "{a}"])])
async def test_a_form_that_the_vocabulary_cannot_spell_is_refused_before_any_work(field, value):
    house = House()
    (model,) = house.pipeline.models.models
    model.spelling = Spelling.of([each for each in SPELLED if each not in (b"{", b"}")])
    guide = guide_of(**{"choices": None, "regex": None, "json_schema": None} | {field: value})
    with pytest.raises(InvalidRequest) as refused:
        await answer(house, request(sampling=Sampling(guide=guide)))
    assert refused.value.message.startswith(
        f"no token of tiny has '{{', '}}', which {field} must have: leave {field} out"
    )
    assert (refused.value.param, refused.value.code) == (field, "constraints_not_supported")
    assert house.vision.calls == []
    assert (await answer(house, request(sampling=Sampling(guide=guide_of(["red"], None, None)))))[0] == "red"
    house.reader.close()
