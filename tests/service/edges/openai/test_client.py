"""The openai package's own client, unmodified, against a real gateway; and its own exceptions for every error."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from service.admission.quota import Cost
from service.core.card import ModelCard
from service.core.errors import (
    STATUS,
    DeadlineExceeded,
    Forbidden,
    GlimpseError,
    InternalError,
    InvalidImage,
    InvalidRequest,
    NotFound,
    Overloaded,
    ShuttingDown,
    SlowBody,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedEncoding,
)
from service.edges.http.edge import ConnectionLimits
from service.edges.openai.described import EXAMPLES
from tests.service.edges.http.test_protocol import Served, served
from tests.service.edges.openai.test_messages import assistant, image, system, text, user
from tests.support.fakes import png
from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway

SHAPES, DIGITS = (SCENES / f"new_00{number}.webp" for number in (3, 4))
QUESTION = "what character is on the pink square?"
PLAIN = {"logprobs": False, "top_logprobs": None}
LONG_ANSWER = "describe the image."


def data_url(path: Path) -> str:
    return f"data:image/webp;base64,{b64encode(path.read_bytes()).decode()}"


ASKED = user(text(QUESTION), image(data_url(SHAPES)))


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest_asyncio.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(card: ModelCard) -> dict[str, Any]:
    return {"model": card.name, "max_tokens": 16}


def test_it_finds_the_model(client, card):
    (model,) = client.models.list()
    assert model.id == card.name
    assert client.models.retrieve(card.name).id == model.id
    assert model.created > 1_600_000_000
    assert model.model_extra["max_positions"] == card.max_positions
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


class Looked(BaseModel):
    """What a product wants to know of an image."""

    shape: Literal["ring", "square"]
    count: Annotated[int, Field(ge=0, le=9)]
    sure: bool


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's own message
def test_an_answer_is_parsed_into_a_model_of_pydantic(client, chat):
    answer = client.chat.completions.parse(**chat | {"max_tokens": 100}, messages=[ASKED], response_format=Looked)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Looked)
    for sent in (answer.choices[0].message, answer.choices[0].message.model_dump()):
        again = client.chat.completions.create(**chat, messages=[ASKED, sent, user(text("sure?"))])
        assert again.choices[0].message.content
    with client.chat.completions.stream(
        **chat | {"max_tokens": 100}, messages=[ASKED], response_format=Looked
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_a_form_that_is_cut_has_no_answer_to_parse(client, chat):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**chat | {"max_tokens": 2}, messages=[ASKED], response_format=Looked)


def test_any_json_object(client, chat):
    drawn = chat | {"max_tokens": 200, "temperature": 2, "seed": 2}
    answer = client.chat.completions.create(**drawn, messages=[ASKED], response_format={"type": "json_object"})
    (choice,) = answer.choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_a_schema_that_cannot_be_followed_is_a_bad_request(client, chat):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(
        openai.BadRequestError, match="response_format cannot be followed: Unimplemented keys"
    ) as caught:
        client.chat.completions.create(**chat, messages=[ASKED], response_format=form)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "response_format")


def test_an_answer_has_usage_and_what_only_we_tell(client, chat, card):
    answer = client.chat.completions.create(**chat, messages=[ASKED])
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert (answer.object, answer.model, answer.system_fingerprint) == (
        "chat.completion",
        card.name,
        card.visual_fingerprint,
    )
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.prompt_tokens_details
    assert usage.prompt_tokens == details.image_tokens + details.text_tokens
    assert details.image_tokens == card.default_visual_tokens[1]
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert answer.vision["visual_tokens"] == details.image_tokens
    assert answer.timing_ms["total"] > 0
    again = client.chat.completions.create(**chat, messages=[ASKED])
    assert again.usage.prompt_tokens_details.cached_tokens == details.image_tokens
    assert again.choices[0].message.content == choice.message.content


async def test_the_async_client_gets_the_same_answer(client, async_client, chat):
    said = client.chat.completions.create(**chat, messages=[ASKED]).choices[0].message
    answers = await asyncio.gather(*(async_client.chat.completions.create(**chat, messages=[ASKED]) for _ in range(4)))
    assert {answer.choices[0].message.content for answer in answers} == {said.content}


def test_a_stream_put_together_is_the_answer(client, chat):
    asked = chat | {"messages": [user(text(LONG_ANSWER), image(data_url(SHAPES)))]}
    whole = client.chat.completions.create(**asked)
    first, *chunks, last, usage = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert first.choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert len(chunks) > 1
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.vision["cache"] == "hit"
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


async def test_the_async_client_streams(async_client, chat):
    asked = chat | {"messages": [user(text(LONG_ANSWER), image(data_url(SHAPES)))]}
    whole = await async_client.chat.completions.create(**asked)
    said = [
        chunk.choices[0].delta.content or ""
        async for chunk in await async_client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(said) == whole.choices[0].message.content


def test_the_clients_own_helper_reads_the_stream(client, chat):
    asked = chat | {"max_tokens": 64, "messages": [user(text(LONG_ANSWER), image(data_url(SHAPES)))]}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_each_token_has_its_log_probability(client, chat):
    asked = chat | {"messages": [user(text(LONG_ANSWER), image(data_url(SHAPES)))], "logprobs": True, "top_logprobs": 3}
    (whole,) = client.chat.completions.create(**asked).choices
    told = whole.logprobs.content
    assert b"".join(bytes(each.bytes) for each in told).decode().strip() == whole.message.content
    assert all(-20 < each.logprob <= 0 for each in told)
    for each in told:  # a greedy answer says the likeliest token
        assert [top.token for top in each.top_logprobs][:1] == [each.token]
        assert len({top.token for top in each.top_logprobs}) == 3
        assert sorted((top.logprob for top in each.top_logprobs), reverse=True) == [
            top.logprob for top in each.top_logprobs
        ]
    streamed = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        if (logprobs := chunk.choices[0].logprobs) is not None
        for each in logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in told]
    assert [len(each.top_logprobs) for each in streamed] == [3] * len(told)
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in told], abs=1e-3)
    assert client.chat.completions.create(**asked | PLAIN).choices[0].logprobs is None


@pytest.mark.parametrize("wish", [{"logprobs": True, "top_logprobs": 21}, {"logprobs": False, "top_logprobs": 5}])
def test_a_wrong_wish_for_likeliest_tokens_is_a_bad_request(client, chat, wish):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat | {"messages": [ASKED]} | wish)
    assert (caught.value.status_code, caught.value.param) == (400, "top_logprobs")


def test_a_file_is_asked_about_by_its_id(client, chat):
    with SHAPES.open("rb") as scene:
        file = client.files.create(file=scene, purpose="vision")
    assert (file.object, file.purpose, file.filename) == ("file", "vision", SHAPES.name)
    assert file.bytes == len(SHAPES.read_bytes())
    assert file.expires_at > file.created_at
    by_id = client.chat.completions.create(**chat, messages=[user(text(QUESTION), image(file.id))])
    by_data = client.chat.completions.create(**chat, messages=[ASKED])
    assert by_id.choices[0].message.content == by_data.choices[0].message.content
    assert by_id.image_ids == by_data.image_ids == [file.id]


def test_two_images_are_one_question(client, chat, card):
    answer = client.chat.completions.create(
        **chat, messages=[user(image(data_url(SHAPES)), text("is there a"), image(data_url(DIGITS)), text("circle?"))]
    )
    assert len(answer.image_ids) == 2
    assert answer.usage.prompt_tokens_details.image_tokens == 2 * card.default_visual_tokens[1]


def test_a_conversation_goes_on_with_the_clients_own_message(client, chat):
    messages: list[Any] = [user(text("is there a pink square?"), image(data_url(SHAPES)))]
    first = client.chat.completions.create(**chat, messages=messages)
    messages += [first.choices[0].message, {"role": "user", "content": "is the pink square below the blue square?"}]
    second = client.chat.completions.create(**chat, messages=messages)
    assert second.choices[0].message.content
    assert second.image_ids == first.image_ids
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("question", [QUESTION, "what color is the triangle?", "how many objects are there?"])
def test_the_image_may_stand_before_or_behind_the_text(client, chat, card, question):
    """Most callers send the text first. An LLM that has not learnt to read that gets the image first all the same."""
    if card.interleaved:
        pytest.skip(f"{card.name} reads images inside the text")
    parts = [text(question), image(data_url(SHAPES))]
    behind, before = (client.chat.completions.create(**chat, messages=[user(*each)]) for each in (parts, parts[::-1]))
    assert behind.choices[0].message.content == before.choices[0].message.content
    assert behind.usage.prompt_tokens == before.usage.prompt_tokens


def test_a_system_message_is_refused_by_a_model_that_has_learnt_none(client, chat, card):
    if card.system_template:
        pytest.skip(f"{card.name} takes system messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat, messages=[system("look closely."), ASKED])
    assert caught.value.param == "messages.0.content"
    assert "has no place for a system message" in caught.value.message


def test_our_own_fields_go_in_extra_body(client, chat, card):
    least = card.vision_tokens[0]
    answer = client.chat.completions.create(
        **chat,
        messages=[ASKED],
        temperature=1.5,
        seed=3,
        top_p=0.9,
        stop=["."],
        extra_body={"vision_tokens": [least, least], "top_k": 5, "timeout_s": 20, "priority": "low", "explain": True},
    )
    assert answer.vision["vision_tokens"] == least
    assert len(answer.relevance) == 1


@pytest.mark.parametrize("name", EXAMPLES)  # "turns" stands after another, which sends its image
def test_the_examples_of_the_document_answer_as_they_say(client, name, card):
    asked = EXAMPLES[name]["value"] | {"model": card.name}
    said = client.chat.completions.create(**asked)
    if asked.get("stream"):
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices)
    else:
        answer = said.choices[0].message.content
    assert EXAMPLES[name]["description"] == f"The reference model answers: {answer}"


def test_the_program_in_the_documentation_runs(gateway, card):
    page = (PROJECT / "docs" / "api.md").read_text()
    program = page.partition("```python\nimport base64\n")[2].partition("```")[0]
    program = "import base64\n" + program.replace("http://127.0.0.1:8080", gateway.url)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.split()[:2], done.stderr) == (["8", str(card.default_visual_tokens[1])], "")


def test_a_parameter_that_is_not_supported_is_a_bad_request(client, chat):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat, messages=[ASKED], n=2)
    error = caught.value
    assert (error.status_code, error.param, error.code) == (400, "n", "unsupported_parameter")
    assert error.type == "invalid_request_error"
    assert error.request_id
    assert "n is not supported" in error.message


def test_an_image_that_is_unknown_is_not_found(client, chat):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**chat, messages=[user(text("?"), image("img_none"))])
    assert (caught.value.param, caught.value.code) == ("messages.0.content.1.image_url", "image_not_found")


# Kinds of errors, of a service whose parts fail on demand.
@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(ConnectionLimits()) as each:
        yield each


def of(service: Served, **options: Any) -> OpenAI:
    host, port = service.address
    return OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", **{"max_retries": 0, "timeout": 30} | options)


def ask(client: OpenAI, **fields: Any) -> Any:
    url = f"data:image/png;base64,{b64encode(png()).decode()}"
    asked = {"model": "tiny", "messages": [user(text("what colour?"), image(url))]} | fields
    return client.chat.completions.create(**asked)


KINDS: list[tuple[GlimpseError, type[openai.APIStatusError]]] = [
    (InvalidRequest("no"), openai.BadRequestError),
    (InvalidImage("no"), openai.BadRequestError),
    (NotFound("no"), openai.NotFoundError),
    (Unauthenticated("no"), openai.AuthenticationError),
    (Forbidden("no"), openai.PermissionDeniedError),
    (Overloaded("no"), openai.RateLimitError),
    (ShuttingDown("no"), openai.InternalServerError),
    (DeadlineExceeded("no"), openai.InternalServerError),
    (Unavailable("no"), openai.InternalServerError),
    (InternalError("no"), openai.InternalServerError),
    # The client has no class for these: their status says which they are.
    (UnsupportedEncoding("no"), openai.APIStatusError),
    (SlowBody("no"), openai.APIStatusError),
    (TooLarge("no"), openai.APIStatusError),
]


def test_every_kind_of_error_is_in_the_table():
    listed = {kind for kind in STATUS if kind.__name__ != "Cancelled"}  # nobody is there to read that
    assert listed <= {type(error) for error, _ in KINDS}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "expected"), KINDS, ids=lambda each: getattr(each, "__name__", type(each).__name__))
def test_every_kind_of_error_is_the_clients_own_exception(service, error, expected, stream):
    service.house.vision.fault = error
    try:
        with of(service) as client, pytest.raises(openai.APIStatusError) as caught:
            ask(client, stream=stream)
    finally:
        service.house.vision.fault = None
    assert type(caught.value) is expected
    assert (caught.value.code, caught.value.type) == (error.code, error.type)
    assert caught.value.status_code == STATUS.get(type(error), STATUS[InvalidRequest])[0]


def test_a_fault_of_the_service_is_an_internal_server_error(service):
    service.house.vision.fault = RuntimeError("secret")
    try:
        with of(service) as client, pytest.raises(openai.InternalServerError) as caught:
            ask(client)
    finally:
        service.house.vision.fault = None
    assert caught.value.code == "internal_error"
    assert "secret" not in caught.value.message


def test_a_full_service_tells_the_client_when_to_retry(service):
    quota = service.house.admission.quota
    held = Cost(tokens=quota.limits.tokens)
    quota.reserve(held, "", 0.0)
    try:
        with of(service) as client, pytest.raises(openai.RateLimitError) as caught:
            ask(client)
    finally:
        quota.give_back(held, "", 0.0)
    assert caught.value.code == "saturated"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with of(service) as client:
        assert ask(client).choices[0].message.content == "red"


def test_an_error_in_a_stream_is_an_api_error(service):
    language = service.house.language
    language.say(" red red red")
    language.wait_at, language.fault = 2, Unavailable("the model llm does not answer: try again")
    try:
        with of(service) as client, pytest.raises(openai.APIError) as caught:
            list(ask(client, stream=True))
    finally:
        language.wait_at, language.fault = 0, None
        language.say(" red")
    assert (caught.value.message, caught.value.code) == ("the model llm does not answer: try again", "unavailable")


def test_an_answer_that_takes_too_long_is_the_clients_timeout(service):
    service.house.language.gate.clear()
    try:
        with of(service, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
            ask(client)
    finally:
        service.house.language.gate.set()


def test_a_service_that_is_not_there_is_a_connection_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_system_message_is_part_of_the_prompt(service):
    with of(service) as client:
        plain = ask(client)
        question = user(text("what colour?"), image(f"data:image/png;base64,{b64encode(png()).decode()}"))
        told = ask(client, messages=[system("look closely."), question])
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_request_can_be_told_by_its_id(service):
    with of(service, default_headers={"x-request-id": "mine"}) as client:
        assert ask(client)._request_id == "mine"


def test_a_conversation_with_an_earlier_image_reaches_the_model(service):
    url = f"data:image/png;base64,{b64encode(png()).decode()}"
    with of(service) as client:
        messages = [user(text("what colour?"), image(url)), assistant("red"), user(text("sure?"))]
        answer = ask(client, messages=messages)
    assert answer.choices[0].message.content == "red"
    assert len(service.house.language.prompts[-1].input_ids) == answer.usage.prompt_tokens


def test_the_client_is_pinned():
    assert f"openai=={openai.__version__}" in (PROJECT / "constraints.txt").read_text().splitlines()
