"""A service with keys: who may call what over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.access.keys import new_key
from service.core.access import Scope
from service.edges.http.access import OPEN, SCOPES, is_open, is_under
from tests.service.edges.http.test_vqa import ASKED, Caller, fault
from tests.support.fakes import CARD, House, png
from tests.support.keys import Keys, bearer

ALL = [*Scope]
CALLS = {
    "ask": ("POST", "/v1/vqa", Scope.ASK),
    "chat": ("POST", "/v1/chat/completions", Scope.ASK),
    "upload": ("POST", "/v1/images", Scope.UPLOAD),
    "file": ("POST", "/v1/files", Scope.UPLOAD),
    "metrics": ("GET", "/metrics", Scope.METRICS),
    "models": ("GET", "/v1/models", None),
    "model": ("GET", "/v1/models/tiny", None),
}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest_asyncio.fixture
async def caller(keys: Keys) -> AsyncIterator[Caller]:
    caller = Caller(House(keys=str(keys.path)))
    yield caller
    await caller.close()


async def status(caller: Caller, call: str, key: str) -> int:
    """Make a call with a body that is wrong, so that a key that is let in gets 400, or 200 without a body."""
    method, path, _ = CALLS[call]
    return (await caller.http.request(method, path, headers=bearer(key))).status_code


@pytest.mark.parametrize("call", CALLS)
async def test_each_scope_allows_its_calls_and_no_others(caller, keys, call):
    needed = CALLS[call][2]
    made = {scope: keys.make("acme", frozenset({scope})) for scope in ALL}
    await caller.house.gate.look()
    for scope, key in made.items():
        allowed = needed in (scope, None) or scope is Scope.ADMIN
        assert (await status(caller, call, key) == 403) is not allowed, scope
    for key in ("", new_key()[0]):
        assert await status(caller, call, key) == 401


async def test_every_route_is_open_or_has_a_scope(caller):
    """A new route is added to SCOPES or OPEN."""
    known = [path for path, _ in SCOPES]
    for path in caller.app.openapi()["paths"]:
        assert is_open(path, metrics_are_open=False) or any(is_under(path, each) for each in known), path


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/page/page.js", "/health/live", "/health/ready"])
async def test_what_is_the_same_for_everyone_needs_no_key(caller, path):
    assert (await caller.http.get(path)).status_code in (200, 503)


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/nothing", "//v1/vqa", "/healthy", "/docs.html", "/metrics/x"])
async def test_an_unknown_path_tells_nothing_without_a_key(caller, keys, path):
    key = keys.make("acme", frozenset({Scope.ADMIN}))
    await caller.house.gate.look()
    url = f"http://localhost{path}"
    fault(await caller.http.get(url), 401)
    fault(await caller.http.get(url, headers=bearer(key)), 404)
    assert not any(is_under(path, each) for each in OPEN)


async def test_metrics_can_be_opened(keys):
    caller = Caller(House(keys=str(keys.path), metrics_without_key=True))
    assert (await caller.http.get("/metrics")).status_code == 200
    fault(await caller.http.get("/v1/models"), 401)
    await caller.close()


@pytest.mark.parametrize(
    "headers",
    [
        lambda key: {"authorization": f"Bearer {key}"},
        lambda key: {"authorization": f"bearer  {key} "},
        lambda key: {"x-api-key": key},
        lambda key: {"x-api-key": key, "authorization": f"Bearer {key}"},
        lambda key: {"x-api-key": key, "x-tenant-id": "acme"},
    ],
)
async def test_a_key_may_stand_in_either_header(caller, keys, headers):
    key = keys.make("acme")
    await caller.house.gate.look()
    response = await caller.http.post("/v1/vqa", json=ASKED, headers=headers(key))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_api_key"),
        ({"authorization": "Bearer "}, 401, "missing_api_key"),
        ({"authorization": "Bearer none"}, 401, "invalid_api_key"),
        ({"x-api-key": "none"}, 401, "invalid_api_key"),
        ({"authorization": "Basic bm9uZTpub25l"}, 401, "invalid_authorization"),
        ({"authorization": "Bearer a", "x-api-key": "b"}, 401, "invalid_authorization"),
        ({"x-tenant-id": "other"}, 403, "wrong_tenant"),
        ({"x-tenant-id": "two words"}, 403, "wrong_tenant"),
    ],
)
async def test_an_error_has_openais_shape_and_a_code(caller, keys, headers, status, code):
    key = keys.make("acme")
    await caller.house.gate.look()
    sent = headers if status == 401 else bearer(key) | headers
    response = await caller.http.post("/v1/vqa", json=ASKED, headers=sent)
    error = fault(response, status)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert (response.headers.get("www-authenticate") is not None) is (status == 401)


async def test_the_key_is_checked_before_the_body_is_read(caller, keys):
    """And before anything is reserved for it."""
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"x")
        yield b"x" * 100

    response = await caller.http.post("/v1/images", content=body(), headers={"x-api-key": "none"})
    fault(response, 401)
    assert read == []
    received: list[str] = []
    app = caller.app

    async def receive() -> dict[str, object]:
        received.append("asked")
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: object) -> None:
        return None

    scope = {"type": "http", "method": "POST", "path": "/v1/vqa", "headers": [(b"host", b"localhost")]}
    await app({**scope, "query_string": b"", "http_version": "1.1"}, receive, send)
    assert received == []
    assert caller.house.counted("glimpse_keys_refused_total", code="missing_api_key") == 1


async def test_the_tenant_is_the_keys(caller, keys):
    """Its requests share what the tenant may hold."""
    key = keys.make("acme")
    await caller.house.gate.look()
    caller.house.language.gate.clear()
    held: list[str] = []
    original = caller.house.pipeline.reservation

    def noting(tenant: str, *more: object, **named: object):
        held.append(tenant)
        caller.house.language.gate.set()
        return original(tenant, *more, **named)

    caller.house.pipeline.reservation = noting
    assert (await caller.http.post("/v1/vqa", json=ASKED, headers=bearer(key))).status_code == 200
    assert held == ["acme"]


async def test_no_key_is_in_the_log_or_in_an_answer(caller, keys):
    key, wrong = keys.make("acme"), new_key()[0]
    with capture_logs() as logs:
        await caller.house.gate.look()
        for each in (key, wrong):
            for headers in (bearer(each), {"x-api-key": each}, {"authorization": f"Basic {each}"}):
                response = await caller.http.post("/v1/vqa", json=ASKED, headers=headers)
                assert each not in response.text
    assert len(logs) >= 3
    assert not [line for line in logs if key[4:] in repr(line) or wrong[4:] in repr(line)]


async def test_openais_client_sends_its_key(caller, keys):
    key = keys.make("acme")
    await caller.house.gate.look()
    client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=caller.http, max_retries=0)
    kept = await client.files.create(file=("a.png", png()), purpose="vision")
    content = [
        {"type": "text", "text": "what colour?"},
        {"type": "image_url", "image_url": {"url": kept.id}},
    ]
    chat = {"model": CARD.name, "messages": [{"role": "user", "content": content}]}
    answer = await client.chat.completions.create(**chat)
    assert answer.choices[0].message.content == "red"
    wrong = client.with_options(api_key="none")
    with pytest.raises(openai.AuthenticationError) as caught:
        await wrong.chat.completions.create(**chat)
    assert caught.value.code == "invalid_api_key"
    reader = keys.make("acme", frozenset({Scope.METRICS}))
    await caller.house.gate.look()
    with pytest.raises(openai.PermissionDeniedError):
        await client.with_options(api_key=reader).chat.completions.create(**chat)


async def test_openapi_says_which_calls_need_a_key(caller):
    spec = (await caller.http.get("/openapi.json")).json()
    assert spec["components"]["securitySchemes"].keys() == {"bearer", "api_key"}
    for path, operations in spec["paths"].items():
        for operation in operations.values():
            needs = not path.startswith("/health")
            assert ("security" in operation) is needs
            assert ({"401", "403"} <= operation["responses"].keys()) is needs
            assert not [each for each in operation.get("parameters", ()) if each["name"] == "x-tenant-id"]
