"""What /openapi.json and /docs say, held against what the service does."""

from __future__ import annotations

import gzip
import inspect
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.edges.http.application import http_api
from service.edges.http.docs import STATIC
from service.edges.http.openapi import BATCH_EXAMPLES, EVENTS, EXAMPLES
from service.edges.http.respond import RequestScope
from service.edges.http.schema import FILES, VqaEvent
from tests.support.fakes import House
from tests.support.paths import PROJECT
from tests.support.servers import Gateway

OUTSIDE = re.compile(r"(?:https?:)?//(?!glimpse[/\"'])[\w.-]+")


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[httpx.AsyncClient]:
    house = House()
    transport = httpx.ASGITransport(http_api(house.edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as caller:
        yield caller
    house.reader.close()


@pytest_asyncio.fixture
async def spec(caller: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await caller.get("/openapi.json")).json())


def test_routes_with_a_body_need_nothing_of_fastapi():
    """They read it themselves, from the request alone, so `RequestScope` runs them without FastAPI."""
    house = House()
    app = http_api(house.edge)
    posts = {path for path, methods in app.openapi()["paths"].items() if "post" in methods}
    (scope,) = (each for each in app.user_middleware if each.cls is RequestScope)
    direct = scope.kwargs["direct"]
    assert {path for _, path in direct} == posts
    assert {tuple(inspect.signature(route.endpoint).parameters) for route in direct.values()} == {("request",)}
    house.reader.close()


async def test_the_docs_need_nothing_but_this_service(caller):
    page = await caller.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href|url)\s*[=:]\s*"([^"]*)"', page.text)
    assert len(named) == 5
    for address in named:
        if address != "data:,":
            assert (await caller.get(str(page.url.join(address)))).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/v1/models", "/openapi.json"])
async def test_no_page_names_an_outside_host(caller, path):
    found = set(OUTSIDE.findall((await caller.get(path)).text))
    assert found <= {"http://localhost"}  # what the caller asked


async def test_the_style_fetches_nothing(caller):
    style = (await caller.get("/docs/swagger-ui.css")).text
    fetched = {address[:5] for address in re.findall(r"url\([\"']?([^)]*)", style)}
    assert fetched == {"data:"}
    assert "@import" not in style


async def test_the_script_asks_nobody_to_check_the_api(caller):
    assert 'validatorUrl: "none"' in (await caller.get("/docs")).text


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js"])
async def test_files_are_sent_packed_to_who_can_unpack(caller, name):
    kept = (STATIC / f"{name}.gz").read_bytes()
    packed = await caller.get(f"/docs/{name}")
    plain = await caller.get(f"/docs/{name}", headers={"accept-encoding": "identity"})
    assert (packed.headers["content-encoding"], packed.headers["content-length"]) == ("gzip", str(len(kept)))
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content == gzip.decompress(kept)


def test_files_of_others_have_their_licences():
    read_me = (STATIC / "README.md").read_text()
    for path in STATIC.iterdir():
        assert path.name == "README.md" or path.name in read_me
    assert "Apache License" in (STATIC / "LICENSE").read_text()


def test_the_package_holds_the_files():
    assert '"service.edges.http" = ["static/*"]' in (PROJECT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_answer_as_they_say(gateway: Gateway, name):
    example = EXAMPLES[name]
    response = httpx.post(f"{gateway.url}/v1/vqa", json=example["value"], timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    if example["value"].get("stream"):
        answer = "".join(event.get("delta", "") for event in events_in(response.text))
    else:
        answer = response.json()["answer"]
    assert example["description"] == f"The reference model answers: {answer}"


def test_the_batchs_example_answers_as_it_says(gateway: Gateway):
    """It asks by the id of the image that the examples above send."""
    httpx.post(f"{gateway.url}/v1/vqa", json=EXAMPLES["short"]["value"], timeout=60, trust_env=False)
    (example,) = BATCH_EXAMPLES.values()
    response = httpx.post(f"{gateway.url}/v1/vqa/batch", json=example["value"], timeout=60, trust_env=False)
    results = sorted((json.loads(line) for line in response.text.splitlines()), key=lambda result: result["index"])
    said = ", ".join(result["answer"] for result in results)
    assert example["description"] == f"The reference model answers: {said}"


def test_every_event_of_a_stream_is_described(gateway: Gateway):
    response = httpx.post(f"{gateway.url}/v1/vqa", json=EXAMPLES["stream"]["value"], timeout=60, trust_env=False)
    for event in [*events_in(response.text), *events_in(EVENTS["example"]), {"error": {"message": "m", "type": "t"}}]:
        if "error" in event:
            event["error"] |= {"param": None, "code": "c"}
        read = VqaEvent.model_validate(event).root
        assert read.model_dump(exclude_unset=True) == event


def events_in(text: str) -> list[dict[str, Any]]:
    *events, done = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_every_part_of_a_path_is_described(spec):
    named = {path: set(re.findall(r"{(\w+)}", path)) for path in spec["paths"]}
    assert any(named.values())
    for path, methods in spec["paths"].items():
        shared = methods.get("parameters", [])
        for operation in (each for key, each in methods.items() if key != "parameters"):
            told = [*shared, *operation.get("parameters", [])]
            assert {each["name"] for each in told if each.get("in") == "path"} == named[path], path


async def test_a_stream_has_a_schema(spec):
    events = spec["paths"]["/v1/vqa"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    done, event = events["itemSchema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert event["contentSchema"] == {"$ref": "#/components/schemas/VqaEvent"}
    kinds = {each["$ref"].rpartition("/")[2] for each in spec["components"]["schemas"]["VqaEvent"]["anyOf"]}
    assert kinds == {"VqaDelta", "VqaEnd", "ErrorBody"}


async def test_a_chats_stream_has_a_schema_of_its_events(spec):
    events = spec["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    _, event = events["itemSchema"]["properties"]["data"]["anyOf"]
    assert event["contentSchema"] == {"$ref": "#/components/schemas/ChatEvent"}


async def test_what_is_refused_is_not_valid_by_the_schema(spec):
    schemas = spec["components"]["schemas"]
    vqa, images = (spec["paths"][path]["post"] for path in ("/v1/vqa", "/v1/images"))
    for operation in (vqa, images):
        (tenant,) = operation["parameters"]
        assert tenant["schema"] == {"type": "string", "pattern": "^[A-Za-z0-9._:-]*$", "maxLength": 64}
    for content in images["requestBody"]["content"].values():
        file = content["schema"].get("properties", {}).get("image", content["schema"])
        assert (file["format"], file["minLength"]) == ("binary", 1)
    assert schemas["VqaForm"]["required"] == ["question"]
    for name in ("image", "frames"):
        files = schemas["VqaForm"]["properties"][name]
        assert (files["minItems"], files["items"]["minLength"]) == (1, 1)
    for name in ("VqaRequest", "VqaForm"):
        question, timeout_s = (schemas[name]["properties"][field] for field in ("question", "timeout_s"))
        assert (question["pattern"], question["maxLength"]) == (r"\S", 2_000)
        assert timeout_s["anyOf"][0] == {"type": "number", "minimum": 1e-6, "maximum": 120.0}


@pytest.mark.parametrize(
    ("field", "least", "most"), [("max_tokens", 1, 1_000_000), ("top_k", 0, 1_000_000), ("seed", 0, 2**63 - 1)]
)
async def test_the_bounds_of_integers_are_in_the_schema(spec, field, least, most):
    for name in ("VqaRequest", "VqaForm"):
        number, _ = spec["components"]["schemas"][name]["properties"][field]["anyOf"]
        assert number == {"type": "integer", "minimum": least, "maximum": most}


async def test_turns_of_a_form_are_one_text(spec):
    text, _ = spec["components"]["schemas"]["VqaForm"]["properties"]["turns"]["anyOf"]
    assert (text["type"], text["contentMediaType"]) == ("string", "application/json")
    assert text["contentSchema"]["items"]["$ref"].rpartition("/")[2] in spec["components"]["schemas"]


async def test_an_image_that_was_sent_links_to_the_question_about_it(spec):
    (link,) = spec["paths"]["/v1/images"]["post"]["responses"]["200"]["links"].values()
    assert link["operationId"] == spec["paths"]["/v1/vqa"]["post"]["operationId"]
    assert set(link["requestBody"]) == {"image", "question"}


async def test_every_optional_field_may_be_null_by_the_schema(spec):
    schemas = spec["components"]["schemas"]
    for name in ("VqaRequest", "VqaForm"):
        for field, schema in schemas[name]["properties"].items():
            if field != "question" and (name, field) not in [("VqaForm", file) for file in FILES]:
                assert {"type": "null"} in schema["anyOf"], field


def texts_in(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from texts_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts_in(value)
    elif isinstance(node, str):
        yield node


async def test_nothing_suggests_a_question_that_the_model_cannot_answer(spec):
    assert not [text for text in texts_in(spec) if "what is this" in text.lower()]
