"""Vertex AI's predict requests: instances in, predictions out in the same order, one failing alone."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.cli.options import url_of
from service.edges.http.application import http_api
from service.settings import SettingsError, read_settings
from tests.support.fakes import House, png
from tests.support.keys import Keys, bearer

IMAGE, OTHER = (base64.b64encode(png(colour)).decode() for colour in ((200, 30, 40), (1, 2, 3)))
ROUTES = {"vertex_predict_route": "/predict", "vertex_health_route": "/health"}


def caller(house: House) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost")


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    house = House(**ROUTES, max_batch_questions=5)
    house.language.say(" red red red red")
    async with caller(house) as http:
        yield http
    house.reader.close()


def instance(question: str = "what colour?", **fields: object) -> dict[str, object]:
    return {"image": IMAGE, "question": question, **fields}


async def predictions(http: httpx.AsyncClient, *instances: object, **more: object) -> list[dict[str, Any]]:
    said = await http.post("/predict", json={"instances": instances, **more})
    assert said.status_code == 200, said.text
    assert said.json().keys() == {"predictions"}
    return said.json()["predictions"]


async def test_predictions_come_in_the_order_of_their_instances(http):
    found = await predictions(http, *(instance(max_tokens=tokens) for tokens in (3, 1, 2)))
    assert [each["usage"]["completion_tokens"] for each in found] == [3, 1, 2]


async def test_a_prediction_has_the_log_probabilities_that_its_instance_asks_for(http):
    asked, plain = await predictions(http, instance(max_tokens=2, logprobs=True, top_logprobs=1), instance())
    assert [len(asked["logprobs"]), len(asked["logprobs"][0]["top_logprobs"])] == [2, 1]
    assert "logprobs" not in plain


async def test_an_instance_that_fails_leaves_the_others_alone(http):
    found = await predictions(http, instance(), instance(""), "no object", {"image": "!", "question": "?"}, instance())
    assert ["answer" in each for each in found] == [True, False, False, False, True]
    assert [each["status"] for each in found[1:4]] == [400, 400, 400]
    assert found[1]["error"]["param"] == "question"


async def test_parameters_hold_for_every_instance_that_says_nothing_else(http):
    found = await predictions(http, instance(), instance(max_tokens=1), parameters={"max_tokens": 2, "top_k": 3})
    assert [each["usage"]["completion_tokens"] for each in found] == [2, 1]
    (whole,) = await predictions(http, {}, parameters=instance(max_tokens=1))
    assert whole["usage"]["completion_tokens"] == 1
    (one,) = await predictions(http, instance(max_tokens=1), parameters=None)
    assert one["answer"]


async def test_a_wrong_parameter_is_told_in_each_prediction(http):
    found = await predictions(http, instance(), instance(), parameters={"colour": 1})
    assert [(each["status"], each["error"]["code"]) for each in found] == [(400, "unknown_field")] * 2


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"[]", 400, "the body is not an object"),
        (b"", 400, "the body is not an object"),
        (b"{}", 400, "instances is missing"),
        (b'{"instances": 1}', 400, "instances is missing or no list"),
        (b'{"instances": []}', 400, "instances is empty"),
        (b'{"instances": [1], "instances": [2]}', 400, "one twice"),
        (b'{"instances": [1], "question": "?"}', 400, "another field"),
        (b'{"instances": [1', 400, "does not end"),
        (b'{"instances": [1]} x', 400, "something follows"),
        (b'{"instances": [1], "parameters": [2]}', 400, "parameters is not an object"),
        (b'{"instances": [1], "parameters": {a}}', 400, "parameters is not valid JSON"),
        (b'{"instances": [1,2,3,4,5,6]}', 413, "more than 5 questions"),
        (b'{"instances": [1], "parameters": {"question": "' + b"x" * 70_000 + b'"}}', 413, "parameters has"),
    ],
)
async def test_a_request_that_cannot_be_read_is_an_error(http, body, status, said):
    answer = await http.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


async def test_another_content_type_is_refused(http):
    assert (await http.post("/predict", content=b"{}", headers={"content-type": "text/plain"})).status_code == 400


async def test_health_has_the_platform_s_path_too(http):
    assert (await http.get("/health")).status_code == (await http.get("/health/ready")).status_code
    assert "faults" in (await http.get("/health")).json()


async def test_without_the_platform_there_is_no_such_route():
    house = House()
    async with caller(house) as http:
        for path in ("/predict", "/v1/vqa/predict"):
            assert (await http.post(path, json={"instances": [instance()]})).status_code == 404
    house.reader.close()


async def test_with_keys_a_predict_request_needs_one_and_a_health_check_does_not(tmp_path):
    keys = Keys(tmp_path)
    key = keys.make("acme")
    house = House(**ROUTES, keys=str(keys.path))
    async with caller(house) as http:
        asked = {"instances": [instance()]}
        assert (await http.post("/predict", json=asked)).status_code == 401
        assert (await http.post("/predict", json=asked, headers=bearer(key))).status_code == 200
        assert (await http.get("/health")).status_code == 503
    house.reader.close()


def test_the_platform_s_variables_are_settings_unless_the_operator_s_are_set():
    aip = {"AIP_HTTP_PORT": "8085", "AIP_PREDICT_ROUTE": "/p", "AIP_HEALTH_ROUTE": "/h", "PORT": "9999"}
    found = read_settings(aip)
    assert (found.http_port, found.vertex_predict_route, found.vertex_health_route) == (8085, "/p", "/h")
    assert read_settings({"PORT": "7860"}).http_port == 7860
    assert read_settings({**aip, "GLIMPSE_HTTP_PORT": "1234"}).http_port == 1234
    assert read_settings({**aip, "glimpse_http_port": "1234"}).http_port == 1234
    assert read_settings({}).vertex_predict_route is None


def test_a_platform_s_route_opens_the_service_to_nobody_else():
    """The variables prove no identity: who listens to other machines still needs keys, or says so."""
    with pytest.raises(SettingsError, match="is not a path"):
        read_settings({"AIP_PREDICT_ROUTE": "predict"})
    assert read_settings({"AIP_PREDICT_ROUTE": "/predict", "GLIMPSE_HTTP_HOST": "0.0.0.0"}).without_keys is None


def test_the_command_line_finds_the_platform_s_port(monkeypatch):
    for name in ("GLIMPSE_HTTP_PORT", "GLIMPSE_HTTP_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PORT", "7860")
    assert url_of(None) == "http://127.0.0.1:7860"


async def test_the_body_of_the_example_is_read(http):
    assert json.loads((await http.post("/predict", json={"instances": [instance(), instance(image=OTHER)]})).text)
