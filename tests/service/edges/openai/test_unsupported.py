"""Every parameter of OpenAI's chat API is supported, or refused by its name. None is ignored."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types.chat import ParsedChatCompletionMessage
from openai.types.chat import completion_create_params as params

from service.core.errors import InvalidRequest
from service.edges.openai.messages import fields_of
from service.edges.openai.schema import SUPPORTED, ChatRequest
from service.edges.openai.unsupported import Unsupported
from tests.service.edges.openai.test_messages import ASKED, assistant, read, request, text, user

TOOL = {"type": "function", "function": {"name": "look"}}
# A value of each parameter that asks for something.
ASKING = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "look"},
    "functions": [{"name": "look"}],
    "logit_bias": {"50256": -100},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "n": 2,
    "parallel_tool_calls": 1,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.5,
    "prompt_cache_options": {"mode": "explicit"},
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [TOOL],
    "verbosity": "high",
    "web_search_options": {},
}
NEUTRAL = {
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0, -0.0],
    "reasoning_effort": ["none"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
}


def test_every_parameter_of_the_client_is_known():
    theirs = {*get_type_hints(params.CompletionCreateParamsNonStreaming), "stream"}
    assert theirs <= set(ChatRequest.model_fields)
    assert set(ASKING) == set(Unsupported.model_fields) == set(ChatRequest.model_fields) - set(SUPPORTED)


@pytest.mark.parametrize("name", ASKING)
def test_what_is_not_supported_is_refused_by_its_name(name):
    with pytest.raises(InvalidRequest) as caught:
        read(ASKED, **{name: ASKING[name]})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert caught.value.message.startswith(f"{name} is not supported: ")


@pytest.mark.parametrize("name", ASKING)
def test_a_value_that_asks_for_nothing_is_taken(name):
    for value in (None, *NEUTRAL.get(name, [])):
        assert request(ASKED, **{name: value}).question == "which shape?"


@pytest.mark.parametrize(("name", "value"), [("n", True), ("n", 1.0), ("store", 0), ("frequency_penalty", False)])
def test_a_value_of_another_type_is_not_neutral(name, value):
    with pytest.raises(InvalidRequest, match=f"^{name} is not supported"):
        read(ASKED, **{name: value})


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages.0.role"),
        ([{"role": "function", "content": "x", "name": "f"}], "messages.0.role"),
        ([ASKED, assistant("a") | {"tool_calls": [TOOL]}, ASKED], "messages.1.tool_calls"),
        ([ASKED, assistant("a") | {"function_call": {"name": "f"}}, ASKED], "messages.1.function_call"),
        ([ASKED, assistant("a") | {"refusal": "no"}, ASKED], "messages.1.refusal"),
        ([ASKED, assistant("a") | {"audio": {"id": "a"}}, ASKED], "messages.1.audio"),
        ([ASKED, assistant([{"type": "refusal", "refusal": "no"}]), ASKED], "messages.1.content.0.type"),
        ([user({"type": "input_audio", "input_audio": {"data": ""}})], "messages.0.content.0.type"),
        (
            [user(text("?") | {"prompt_cache_breakpoint": {"mode": "explicit"}})],
            "messages.0.content.0.prompt_cache_breakpoint",
        ),
    ],
)
def test_a_part_of_a_message_that_is_not_supported_is_named(messages, param):
    with pytest.raises(InvalidRequest) as caught:
        read(*messages)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_an_answer_can_be_sent_back_as_it_came():
    answer = assistant("a circle") | {"refusal": None, "annotations": [], "tool_calls": None, "function_call": None}
    assert request(ASKED, answer, user(text("sure?"))).exchanges[0].answer == "a circle"


def test_an_answer_that_the_client_parsed_can_be_sent_back():
    """The whole of model_dump, which has each field of the client's message."""
    message = ParsedChatCompletionMessage[Any](role="assistant", content='{"a":1}', parsed={"a": {"b": [1]}})
    for dumped in (message.model_dump(), message.to_dict()):
        asked = request(ASKED, dumped, user(text("sure?")))
        assert asked.exchanges[0].answer == '{"a":1}'


def test_only_an_assistants_message_is_a_parsed_one():
    with pytest.raises(InvalidRequest) as caught:
        request(ASKED | {"parsed": {}})
    assert (caught.value.param, caught.value.code) == ("messages.0.parsed", "unsupported_parameter")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMS = {
    "text": ({"type": "text"}, None),
    "any object": ({"type": "json_object"}, '{"type":"object"}'),
    "a schema": (
        {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}},
        '{"type":"object","properties":{"a":{"type":"integer"}}}',
    ),
    "a name alone": ({"type": "json_schema", "json_schema": {"name": "s"}}, '{"type":"object"}'),
}


@pytest.mark.parametrize(("form", "schema"), FORMS.values(), ids=FORMS)
def test_the_form_of_an_answer_is_a_schema(form, schema):
    guide = request(ASKED, response_format=form).sampling.guide
    assert (guide and guide.text) == schema


BAD_FORMS = {
    "no schema": ({"type": "json_schema"}, {}, "response_format", "response_format.json_schema is missing"),
    "a schema of no use": (
        {"type": "text", "json_schema": {"name": "s"}},
        {},
        "response_format",
        'the type "text": make the type "json_schema"',
    ),
    "another type": ({"type": "xml"}, {}, "response_format.type", "response_format.type should be"),
    "another field": ({"type": "text", "name": "s"}, {}, "response_format.name", "there is no field"),
    "another field of the schema": (
        {"type": "json_schema", "json_schema": {"name": "s", "schemes": {}}},
        {},
        "response_format.json_schema.schemes",
        "did you mean schema",
    ),
    "two schemas": ({"type": "json_object"}, {"json_schema": {}}, "json_schema", "are both given"),
    "two forms": ({"type": "json_object"}, {"regex": "a"}, "response_format", "regex and response_format"),
    "a deep bound": (
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {"maxItems": 10**9}}},
        {},
        "response_format",
        "^response_format repeats something 1000000000 times",
    ),
}


@pytest.mark.parametrize(("form", "more", "param", "why"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_a_form_that_is_none_is_refused_in_the_chats_words(form, more, param, why):
    with pytest.raises(InvalidRequest, match=why) as caught:
        request(ASKED, response_format=form, **more)
    assert caught.value.param == param


def test_options_of_a_stream_that_are_not_supported_are_named():
    with pytest.raises(InvalidRequest) as caught:
        read(ASKED, stream=True, stream_options={"include_obfuscation": True})
    assert (caught.value.param, caught.value.code) == ("stream_options.include_obfuscation", "unsupported_parameter")
    chat = read(ASKED, stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert fields_of(chat)[0].stream
