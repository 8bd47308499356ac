"""POST /v1/chat/completions and its neighbours, of a service without Triton."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.core.errors import GlimpseError, Overloaded, Unavailable
from service.edges.http.json_bounds import split
from service.edges.openai.chat import is_image
from service.edges.openai.schema import ChatCompletion, ChatEvent, ChatRequest
from tests.service.edges.http.test_json_bounds import CHARS
from tests.service.edges.http.test_vqa import Caller, events, fault
from tests.service.edges.openai.test_messages import ASKED, assistant, image, system, text, user
from tests.support.fakes import CARD, SPELLED, House, ids_of, png

FILE = png()
IMAGE = f"data:image/png;base64,{b64encode(FILE).decode()}"
QUESTION = user(text("what colour?"), image(IMAGE))
MODEL = {"model": "tiny"}
CARD_WITHOUT_SYSTEM = replace(CARD, system_template="")


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(max_image_bytes=100_000, max_image_pixels=1_000_000))
    yield caller
    await caller.close()


async def ask(caller: Caller, *messages: dict[str, Any], **fields: object) -> httpx.Response:
    body = MODEL | {"messages": messages or (QUESTION,)} | fields
    return await caller.http.post("/v1/chat/completions", json=body)


async def chunks(caller: Caller, *messages: dict[str, Any], **fields: object) -> list[dict[str, Any]]:
    *told, done = events(await ask(caller, *messages, stream=True, **fields))
    assert done == "[DONE]"
    for each in told:
        ChatEvent.model_validate_json(each)
    return [json.loads(each) for each in told]


async def test_an_answer_has_everything_that_openai_and_we_tell(caller):
    response = await ask(caller)
    answer = response.json()
    assert response.status_code == 200
    ChatCompletion.model_validate(answer)
    assert answer.pop("id").startswith("chatcmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer.pop("timing_ms").keys() == {"queue", "load", "vision", "first_token", "total"}
    assert answer.pop("image_ids")[0].startswith("img_")
    prompt = len(caller.house.language.prompts[0].input_ids)
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "v",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "red", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 1,
            "total_tokens": prompt + 1,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "image_tokens": 32,
                "text_tokens": prompt - 32,
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "accepted_prediction_tokens": 0,
                "audio_tokens": 0,
                "reasoning_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "vision": {
            "cache": "miss",
            "vision_tokens": 64,
            "visual_tokens": 32,
            "detail": "low",
            "reduced": False,
            "fit": "squash",
        },
    }


async def test_a_known_images_tokens_count_as_cached(caller):
    await ask(caller)
    details = (await ask(caller)).json()["usage"]["prompt_tokens_details"]
    assert (details["cached_tokens"], details["image_tokens"]) == (32, 32)


async def test_it_explains_on_request(caller):
    (relevance,) = (await ask(caller, explain=True)).json()["relevance"]
    assert len(relevance["map"]) == 16
    assert "relevance" not in (await ask(caller)).json()
    assert (await chunks(caller, explain=True))[-1]["relevance"] == [relevance]


async def test_the_prompt_holds_the_conversation_with_images_in_place(caller):
    await ask(caller, system("be brief"), QUESTION, assistant("red"), user(image(IMAGE), text("sure?")))
    (prompt,) = caller.house.language.prompts
    before, between = ids_of("be brief Question: what colour?"), ids_of(" Answer: red")
    visual = list(range(CARD.vocab_size, CARD.vocab_size + 64))
    after = ids_of(" Question: sure? Answer:")
    expected = [CARD.bos_id, *before, *visual[:32], *between, *visual[32:], *after]
    assert prompt.input_ids.tolist() == expected


async def test_a_stream_says_the_role_then_the_text_then_the_end(caller):
    caller.house.language.say(" red red")
    first, *texts, last = await chunks(caller)
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert "".join(each["choices"][0]["delta"]["content"] for each in texts) == "red red"
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert last["vision"]["cache"] == "miss"
    assert last["timing_ms"]["total"] > 0
    heads = {(each["id"], each["created"], each["model"], each["object"]) for each in (first, *texts, last)}
    assert len(heads) == 1
    assert not any("usage" in each for each in (first, *texts, last))


async def test_a_stream_without_text_has_a_role_and_an_end(caller):
    caller.house.language.say("")
    first, last = await chunks(caller)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "stop"


async def test_the_usage_has_a_chunk_of_its_own_on_request(caller):
    whole = (await ask(caller)).json()["usage"]
    *others, last = await chunks(caller, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == whole | {"prompt_tokens_details": whole["prompt_tokens_details"] | {"cached_tokens": 32}}
    assert [each["usage"] for each in others] == [None] * 3


def spoken(logprobs: dict[str, Any] | None) -> list[tuple[str, float, list[int]]]:
    assert logprobs is not None
    assert logprobs["refusal"] is None
    return [(each["token"], each["logprob"], each["bytes"]) for each in logprobs["content"]]


@pytest.mark.parametrize(
    ("answer", "stop", "text", "tokens"),
    [
        (" red red", [], "red red", [" red", " red"]),
        (" red. red", ["."], "red", [" red"]),
        ("é", [], "é", ["\\xc3", "\\xa9"]),
        ("red re", ["red!"], "red re", ["red", " ", "re"]),
        ("", [], "", []),
    ],
)
async def test_each_token_has_its_log_probability_on_request(caller, answer, stop, text, tokens):
    caller.house.language.say(answer)
    (choice,) = (await ask(caller, logprobs=True, top_logprobs=0, stop=stop)).json()["choices"]
    assert choice["message"]["content"] == text
    told = spoken(choice["logprobs"])
    assert [token for token, _, _ in told] == tokens
    assert [logprob for _, logprob, _ in told] == [-place / 2 for place in range(len(told))]
    assert bytes(each for *_, spelled in told for each in spelled).decode().strip() == text
    assert caller.house.language.sampling[-1].log_probs
    streamed = [each["choices"][0] for each in await chunks(caller, logprobs=True, stop=stop)]
    pieces = [each for each in streamed if each["delta"].get("content")]
    assert [one for each in pieces for one in spoken(each["logprobs"])] == told
    assert all(each["logprobs"] is None for each in streamed if each not in pieces)


async def test_log_probabilities_are_asked_for_only_on_request(caller):
    (choice,) = (await ask(caller, logprobs=False)).json()["choices"]
    assert choice["logprobs"] is None
    assert not caller.house.language.sampling[-1].log_probs


async def test_the_likeliest_tokens_stand_beside_each_token_on_request(caller):
    caller.house.language.say(" red é")
    (choice,) = (await ask(caller, logprobs=True, top_logprobs=20)).json()["choices"]
    for place, each in enumerate(choice["logprobs"]["content"]):
        assert [(top["bytes"], top["logprob"]) for top in each["top_logprobs"]] == [
            ([*spelled], -place / 4) for spelled in SPELLED[3:23]
        ]
    streamed = [each["choices"][0]["logprobs"] for each in await chunks(caller, logprobs=True, top_logprobs=20)]
    assert [one for each in streamed if each for one in each["content"]] == choice["logprobs"]["content"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: set logprobs to true"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs needs logprobs: set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "greater than or equal to 0"),
        ({"logprobs": True, "top_logprobs": "2"}, "top_logprobs"),
        ({"logprobs": "yes"}, "logprobs"),
    ],
)
async def test_a_wrong_wish_for_likeliest_tokens_is_refused(caller, asked, why):
    error = fault(await ask(caller, **asked), 400)
    assert error["param"] == list(asked)[-1]
    assert why in error["message"]
    assert not caller.house.language.sampling


async def test_an_error_after_the_first_chunk_is_an_event(caller):
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 2
    caller.house.language.fault = Unavailable("the model llm does not answer: try again")
    *before, last = await chunks(caller)
    assert [each["object"] for each in before] == ["chat.completion.chunk"] * 3
    assert last == {
        "error": {
            "message": "the model llm does not answer: try again",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }


async def test_an_error_before_the_first_chunk_has_its_status(caller):
    caller.house.vision.fault = Overloaded("full", retry_after_s=3)
    response = await ask(caller, stream=True)
    assert fault(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "fields", "status", "param", "code"),
    [
        ([user(text("?"), image("img_none"))], {}, 404, "messages.0.content.1.image_url", "image_not_found"),
        ([user(text("?"), image("aGVsbG8="))], {}, 400, "messages.0.content.1.image_url", "invalid_image"),
        (
            [user(image("https://a.example/x.png"), text("?"))],
            {},
            400,
            "messages.0.content.0.image_url",
            "url_not_supported",
        ),
        (
            [user(image(IMAGE)), assistant("a"), user(text("?"), image("aGVsbG8="))],
            {},
            400,
            "messages.0.content",
            "invalid_request",
        ),
        (
            [QUESTION, assistant("a"), user(text("?"), image("aGVsbG8="))],
            {},
            400,
            "messages.2.content.1.image_url",
            "invalid_image",
        ),
        (
            [user(image(IMAGE, detail="high"), text("?"))],
            {},
            400,
            "messages.0.content.0.image_url.detail",
            "detail_not_supported",
        ),
        ([], {"vision_tokens": [1, 2]}, 400, "vision_tokens", "invalid_request"),
        ([], {"max_completion_tokens": 999}, 400, "max_completion_tokens", "context_length_exceeded"),
        ([QUESTION, assistant("a" * 200), QUESTION], {}, 400, "messages", "context_length_exceeded"),
        ([], {"model": "gpt-5"}, 404, "model", "model_not_found"),
        ([], {"timeout_s": 1e-6}, 504, "timeout_s", "deadline_exceeded"),
        ([], {"tools": [{}]}, 400, "tools", "unsupported_parameter"),
        ([], {"max_tokens": 0}, 400, "max_tokens", "invalid_request"),
    ],
)
async def test_every_error_names_the_chats_field(caller, messages, fields, status, param, code, stream):
    error = fault(await ask(caller, *messages, **fields, stream=stream), status)
    assert (error["param"], error["code"]) == (param, code)
    assert "images." not in error["message"]


async def test_a_system_message_is_refused_if_the_model_has_no_place_for_it():
    caller = Caller(House(CARD_WITHOUT_SYSTEM))
    error = fault(await ask(caller, system("be brief"), QUESTION), 400)
    assert error["param"] == "messages.0.content"
    assert error["message"] == "tiny has no place for a system message: put it into the question"
    assert (await ask(caller)).status_code == 200
    await caller.close()


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_request"),
        (FILE, "application/json", "invalid_json"),
        (b"a=b", "application/x-www-form-urlencoded", "unsupported_content_type"),
        (b"", "application/json", "invalid_json"),
    ],
)
async def test_a_body_that_is_no_chat_is_refused(caller, body, content_type, code):
    headers = {"content-type": content_type}
    response = await caller.http.post("/v1/chat/completions", content=body, headers=headers)
    assert fault(response, 400)["code"] == code


async def test_a_body_that_is_too_large_names_a_field_of_the_chat():
    caller = Caller(House(max_image_bytes=1_000))
    error = fault(await ask(caller, user(text("?"), image("a" * 1_100_000))), 413)
    assert error["param"] == "messages"
    assert error["message"].startswith("the body has ")
    await caller.close()


async def test_questions_are_counted_by_route(caller):
    await ask(caller)
    await ask(caller, model="other")
    for status in ("200", "404"):
        labels = {"method": "POST", "route": "/v1/chat/completions", "status": status}
        assert caller.house.counted("glimpse_http_requests_total", **labels) == 1
    await caller.http.get("/v1/models/tiny")
    labels = {"method": "GET", "route": "/v1/models/{model}", "status": "200"}
    assert caller.house.counted("glimpse_http_requests_total", **labels) == 1


async def test_tenants_come_from_the_header_and_not_from_user(caller):
    headers = {"x-tenant-id": "two words"}
    body = MODEL | {"messages": [QUESTION], "user": "acme"}
    response = await caller.http.post("/v1/chat/completions", json=body, headers=headers)
    assert fault(response, 400)["code"] == "invalid_tenant"
    assert "acme" not in (await caller.http.get("/metrics")).text


# What a body may hold besides its images.
LARGE = b64encode(bytes(3_000_000)).decode()


def chat(*messages: object, **fields: object) -> bytes:
    return json.dumps(MODEL | {"messages": messages} | fields).encode()


@pytest.mark.parametrize("indent", [None, 2])
async def test_images_may_be_large(indent):
    body = MODEL | {"messages": [system("s"), user(image(LARGE), text("?"), image(LARGE, detail="low"))] * 9}
    await split(json.dumps(body, indent=indent).encode(), CHARS, ChatRequest.model_fields, is_image)


@pytest.mark.parametrize(
    "body",
    [
        chat(user(text(LARGE))),
        chat(user(image("img_1", detail=LARGE))),
        chat({"role": "user", "content": LARGE}),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": LARGE}]}),
        chat({"role": "user", "content": [{"type": "image_url", "url": LARGE}]}),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": [LARGE]}}]}),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {LARGE: "url"}}]}),
        chat(ASKED, user={"a": [{"b": [{"url": LARGE}]}]}),
        chat(*[{}] * 20_000),
        chat(user(*[image("img_1")] * 5_000)),
    ],
    ids=range(10),
)
async def test_nothing_else_may_be_large(body):
    with pytest.raises(GlimpseError) as caught:
        await split(body, CHARS, ChatRequest.model_fields, is_image)
    assert caught.value.code == "too_large"


async def test_a_large_image_is_answered(caller):
    padded = b64encode(FILE + bytes(90_000)).decode()
    messages = [QUESTION, assistant("red")] * 2 + [user(*[image(padded)] * 3, text("?"))]
    assert len(chat(*messages)) > 256 * 1024  # parsed in a thread
    wide = Caller(House(max_image_bytes=100_000, max_image_pixels=1_000_000))
    error = fault(await ask(wide, *messages), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert (await ask(wide, user(image(padded), text("?")))).status_code == 200
    await wide.close()


# Models and files.
async def test_models_have_openais_shape_with_ours_beside_it(caller):
    listed = (await caller.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "glimpse")
    assert abs(model["created"] - time.time()) < 600
    assert model["budget"] == {"vision_tokens": [64, 256], "visual_tokens": [32, 32]}
    full = (await caller.http.get("/v1/models?detail=full")).json()["data"]
    assert (await caller.http.get("/v1/models/tiny")).json() == full[0] == model | {"metadata": {}}
    assert fault(await caller.http.get("/v1/models?detail=some"), 400)["param"] == "detail"
    error = fault(await caller.http.get("/v1/models/other"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def upload(caller: Caller, file: bytes = FILE, **fields: str) -> httpx.Response:
    return await caller.http.post("/v1/files", files={"file": ("scene.png", file)}, data={"purpose": "vision"} | fields)


async def test_a_file_is_an_image_that_can_be_asked_about(caller):
    kept = (await upload(caller)).json()
    image_id = kept["id"]
    assert kept["expires_at"] - kept["created_at"] in (3600, 3601)
    assert abs(kept["created_at"] - time.time()) < 60
    assert {name: kept[name] for name in ("object", "bytes", "filename", "purpose", "status", "width", "height")} == {
        "object": "file",
        "bytes": len(FILE),
        "filename": "scene.png",
        "purpose": "vision",
        "status": "processed",
        "width": 224,
        "height": 224,
    }
    answer = (await ask(caller, user(text("?"), image(image_id)))).json()
    assert answer["image_ids"] == [image_id]
    assert (await caller.http.post("/v1/images", content=FILE)).json()["id"] == image_id


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"purpose": "fine-tune"}, "purpose", "unsupported_parameter"),
        ({"purpose": ""}, "purpose", "unsupported_parameter"),
        ({"expires_after[seconds]": "60"}, "expires_after", "unsupported_parameter"),
        ({"name": "x"}, "name", "unknown_field"),
    ],
)
async def test_a_field_of_a_file_that_breaks_a_rule_is_named(caller, fields, param, code):
    error = fault(await upload(caller, **fields), 400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("name", ["file", "purpose"])
async def test_a_file_needs_both_fields_once(caller, name):
    parts = {"file": ("x.png", FILE), "purpose": (None, b"vision")}
    others = [(each, part) for each, part in parts.items() if each != name]
    missing = fault(await caller.http.post("/v1/files", files=others), 400)
    assert (missing["param"], missing["code"]) == (name, "missing_field")
    twice = fault(await caller.http.post("/v1/files", files=[*parts.items(), (name, parts[name])]), 400)
    assert (twice["param"], twice["message"]) == (name, f"{name} is given twice: send it once")


async def test_a_file_that_is_no_image_names_the_field(caller):
    error = fault(await upload(caller, b"hello"), 400)
    assert (error["param"], error["code"]) == ("file", "invalid_image")
    large = fault(await upload(caller, bytes(170_000)), 413)
    assert large["param"] == "file"
    bare = fault(await caller.http.post("/v1/files", content=FILE), 400)
    assert bare["code"] == "unsupported_content_type"


async def test_the_document_describes_chats_with_examples_that_are_valid(caller):
    spec = (await caller.http.get("/openapi.json")).json()
    body = spec["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        response = await caller.http.post("/v1/chat/completions", json=example["value"] | MODEL)
        assert response.status_code in (200, 404), response.text
    schema = spec["components"]["schemas"]["ChatRequest"]
    assert schema["properties"]["timeout_s"]["anyOf"][0]["maximum"] == 120
    assert schema["properties"]["n"]["enum"] == [None, 1]
    assert sorted(schema["required"]) == ["messages", "model"]
