"""Test how the form of an answer is read: bounds, escapes, one form at most."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import InvalidRequest
from service.core.guide import MAX_GUIDE_BYTES, Guide, guide_of, require_small


def guide(choices=None, regex=None, json_schema=None) -> Guide | None:
    return guide_of(choices, regex, json_schema)


def test_a_request_without_a_form_has_no_guide():
    assert guide() is None


texts = st.text(min_size=1, max_size=20).filter(lambda text: text == text.strip())


@given(st.lists(texts, min_size=1, max_size=5), texts)
def test_choices_match_themselves_and_nothing_else(choices, other):
    found = guide(choices=choices)
    assert (found.kind, found.field) == ("regex", "choices")
    assert all(re.fullmatch(found.text, choice) for choice in choices)
    assert bool(re.fullmatch(found.text, other)) is (other in choices)


def test_a_schema_is_compact_json_with_its_letters():
    assert guide(json_schema={"const": "é"}) == Guide("json_schema", '{"const":"é"}')


deep: dict = {}
for _ in range(70):
    deep = {"items": deep}

REFUSED = {
    "two forms": ({"choices": ["a"], "regex": "a"}, "regex", "choices and regex are both given"),
    "no choices": ({"choices": []}, "choices", "send 1 to 256"),
    "too many choices": ({"choices": ["a"] * 257}, "choices", "send 1 to 256"),
    "an empty choice": ({"choices": ["a", ""]}, "choices", "choices.1 has 0 characters"),
    "a long choice": ({"choices": ["a" * 257]}, "choices", "choices.0 has 257 characters"),
    "a choice with white space": ({"choices": ["a", "b "]}, "choices", "choices.1 has white space"),
    "an empty expression": ({"regex": ""}, "regex", "regex has 0 characters"),
    "a long expression": ({"regex": "a" * 2049}, "regex", "regex has 2049 characters"),
    "a large count": ({"regex": "a{257}"}, "regex", "repeats something 257 times"),
    "many counts": ({"regex": "a{250}b{250}c{250}d{250}e{25}"}, "regex", "1025 together"),
    "a long schema": ({"json_schema": {"title": "a" * 16_384}}, "json_schema", "16,396 bytes"),
    "a deep schema": ({"json_schema": deep}, "json_schema", "nested more than 60"),
    "many items": ({"json_schema": {"minItems": 10**9}}, "json_schema", "repeats something 1000000000 times"),
    "many items inside": ({"json_schema": {"anyOf": [{"items": {"maxItems": 300}}]}}, "json_schema", "300 times"),
    "many counts inside": (
        {"json_schema": {"properties": {f"p{i}": {"minItems": 256} for i in range(5)}}},
        "json_schema",
        "1280 together",
    ),
    "long strings": ({"json_schema": {"maxLength": 4097}}, "json_schema", "a maxLength of 4097"),
    "a count that is none": ({"json_schema": {"maxItems": "3"}}, "json_schema", "maxItems that is not a whole number"),
    "a fraction of an item": ({"json_schema": {"maxItems": 1.5}}, "json_schema", "maxItems that is not a whole number"),
    "a large multiple": ({"json_schema": {"multipleOf": 999_983}}, "json_schema", "product of all multipleOf"),
    "multiples of one another": (
        {"json_schema": {"allOf": [{"multipleOf": 97}, {"multipleOf": 0.89}]}},
        "json_schema",
        "product of all multipleOf",
    ),
    "a multiple of nothing": ({"json_schema": {"multipleOf": 0}}, "json_schema", "not a number above 0"),
    "a pattern with a large count": ({"json_schema": {"pattern": "a{999}"}}, "json_schema", "repeats something 999"),
    "a pattern as a name": (
        {"json_schema": {"patternProperties": {"a{999}": {}}}},
        "json_schema",
        "repeats something 999",
    ),
}


@pytest.mark.parametrize(("form", "param", "why"), REFUSED.values(), ids=REFUSED)
def test_a_form_out_of_bounds_is_refused(form, param, why):
    with pytest.raises(InvalidRequest, match=re.escape(why)) as caught:
        guide(**form)
    assert caught.value.param == param


@given(st.lists(texts, min_size=1, max_size=5))
def test_what_requests_may_ask_for_is_small_enough_for_the_llm(choices):
    require_small(guide(choices=choices))
    widest = [f"{number:03}{'$' * 250}{choices[0]}"[:256].strip() for number in range(256)]
    long = guide(choices=widest)
    assert 2048 < len(long.text.encode()) <= MAX_GUIDE_BYTES
    require_small(long)


# An expression without special characters is a choice for the LLM, and may be as long as 256 choices.
OF_CLIENTS = {
    name: each
    for name, each in REFUSED.items()
    if "choices" not in each[0] and name not in ("an empty expression", "a long expression")
}


@pytest.mark.parametrize(("form", "param", "why"), OF_CLIENTS.values(), ids=OF_CLIENTS)
def test_a_guide_that_a_client_sends_to_the_llm_has_the_same_bounds(form, param, why):
    value = form[param]
    text = value if param == "regex" else json.dumps(value, separators=(",", ":"))
    with pytest.raises(InvalidRequest, match=re.escape(why)):
        require_small(Guide(param, text, param))


@pytest.mark.parametrize("text", ["[]", "{", '{"maxItems": Infinity}', "[" * 100_000, '"' + "a" * MAX_GUIDE_BYTES])
def test_a_text_that_is_no_schema_is_refused(text):
    with pytest.raises(InvalidRequest):
        require_small(Guide("json_schema", text, "guided_decoding_guide"))


def test_values_in_a_schema_are_no_schemas():
    assert guide(json_schema={"enum": [{"minItems": 10**9}], "const": {"maxLength": "x"}})
    assert guide(json_schema={"properties": {"minItems": {"type": "integer"}, "multipleOf": {"type": "integer"}}})
