"""GET and PATCH /v1/variants: who may, what a body may hold, and how it is refused."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from service.core.access import Scope
from service.core.errors import Unavailable
from service.core.variant import VariantsChange, VariantState
from service.edges.http.application import http_api
from tests.service.edges.http.test_vqa import Caller, fault
from tests.support.fakes import House
from tests.support.keys import Keys, bearer

PATH = "/v1/variants"
STATES = [
    VariantState("stable", 95.0, 0.95, False, "tiny", 2, 1, 3),
    VariantState("next", 5.0, 0.05, True),
]


class FakeControl:
    """Remembers what it was asked to change."""

    sticky = "tenant"

    def __init__(self) -> None:
        self.asked: list[tuple[VariantsChange, dict[str, str]]] = []
        self.fault: Exception | None = None

    def states(self) -> Sequence[VariantState]:
        return STATES

    async def change(self, change: VariantsChange, **who: str) -> Sequence[VariantState]:
        if self.fault is not None:
            raise self.fault
        self.asked.append((change, who))
        return STATES


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest_asyncio.fixture
async def caller(keys: Keys, control: FakeControl) -> AsyncIterator[Caller]:
    house = House(keys=str(keys.path), quota_requests_per_minute=1, max_requests_in_flight=1)
    house.edge = replace(house.edge, variants=control)
    caller = Caller(house)
    caller.http.headers.update(bearer(keys.make("ops", frozenset({Scope.ADMIN}))))
    await house.gate.look()
    yield caller
    await caller.close()


async def test_an_administrator_sees_the_variants(caller):
    said = (await caller.http.get(PATH)).json()
    assert said == {
        "object": "list",
        "sticky": "tenant",
        "data": [
            {
                "name": "stable",
                "model": "tiny",
                "weight": 95.0,
                "share": 0.95,
                "draining": False,
                "tritons": 2,
                "tritons_out": 1,
                "in_flight": 3,
            },
            {
                "name": "next",
                "weight": 5.0,
                "share": 0.05,
                "draining": True,
                "tritons": 0,
                "tritons_out": 0,
                "in_flight": 0,
            },
        ],
    }
    assert (await caller.http.head(PATH)).content == b""


async def test_an_administrator_changes_them_and_is_named(caller, control, keys):
    body = {"weights": {"stable": 50, "next": 50.5}, "draining": {"next": False}}
    said = await caller.http.patch(PATH, json=body, headers={"x-request-id": "mine"})
    assert said.status_code == 200, said.text
    assert [each["name"] for each in said.json()["data"]] == ["stable", "next"]
    ((change, who),) = control.asked
    assert (change.weights, change.draining) == ({"stable": 50, "next": 50.5}, {"next": False})
    (key,) = keys.ring.keys.values()
    assert who == {"tenant": "ops", "key": key.id, "request_id": "mine"}


async def test_a_full_service_and_a_used_quota_do_not_keep_an_administrator_out(caller, control):
    with caller.house.pipeline.reservation("another") as reservation:
        reservation.reserve(caller.house.admission.quota.limits)
        for _ in range(3):
            assert (await caller.http.patch(PATH, json={"weights": {"next": 1}})).status_code == 200
            assert (await caller.http.get(PATH)).status_code == 200
    assert len(control.asked) == 3


async def test_a_change_that_drips_is_given_up_however_much_has_come(caller, control):
    edge = caller.house.edge
    caller.http._transport.app = http_api(replace(edge, bodies=replace(edge.bodies, grace_s=0.2, min_bytes_per_s=1)))

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async with asyncio.timeout(10):
        said = await caller.http.patch(PATH, content=drip())
    error = fault(said, 408)
    assert (error["code"], error["message"]) == ("slow_body", "the body did not come within 0.2 s: try again")
    assert control.asked == []


@pytest.mark.parametrize("scope", [each for each in Scope if each is not Scope.ADMIN])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PATCH", "POST", "DELETE", "PUT"])
async def test_other_scopes_are_refused(caller, keys, control, scope, method):
    key = keys.make("acme", frozenset({scope}))
    await caller.house.gate.look()
    for path in (PATH, f"{PATH}/", f"{PATH}/stable", "/v1/%76ariants"):
        said = await caller.http.request(method, path, json={"weights": {"next": 1}}, headers=bearer(key))
        assert said.status_code == 403, path
    assert control.asked == []


async def test_without_keys_nobody_is_an_administrator(control):
    for knobs in ({}, {"http_host": "0.0.0.0", "without_keys": "anyone-may-ask"}):
        house = House(**knobs)
        house.edge = replace(house.edge, variants=control)
        caller = Caller(house)
        for headers in ({}, {"x-tenant-id": "ops"}, bearer("glk_00000000_wrong")):
            for method in ("GET", "PATCH"):
                said = await caller.http.request(method, PATH, json={"weights": {"next": 1}}, headers=headers)
                error = fault(said, 403)
                assert "the service has no keys" in error["message"]
        await caller.close()
    assert control.asked == []


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"[]", "invalid_request", None),
        (b"{}", "invalid_request", None),
        (b'{"weight": {"next": 1}}', "unknown_field", "weight"),
        (b'{"weights": {}}', "invalid_request", "weights"),
        (b'{"weights": null}', "invalid_request", "weights"),
        (b'{"weights": {"next": -1}}', "invalid_request", "weights.next"),
        (b'{"weights": {"next": 1000001}}', "invalid_request", "weights.next"),
        (b'{"weights": {"next": 1e999}}', "invalid_request", "weights.next"),
        (b'{"weights": {"next": NaN}}', "invalid_request", "weights.next"),
        (b'{"weights": {"next": "5"}}', "invalid_request", "weights.next"),
        (b'{"weights": {"next": true}}', "invalid_request", "weights.next"),
        (b'{"draining": {"next": 1}}', "invalid_request", "draining.next"),
        (b'{"draining": {"next": null}}', "invalid_request", "draining.next"),
        (b'{"weights": ' + b"[" * 30_000, "invalid_json", None),
    ],
)
async def test_a_wrong_body_is_refused_and_asks_nothing(caller, control, body, code, param):
    said = await caller.http.patch(PATH, content=body, headers={"content-type": "application/json"})
    error = fault(said, 400)
    assert (error["code"], error["param"]) == (code, param)
    assert control.asked == []


async def test_other_bodies_are_refused(caller, control):
    assert fault(await caller.http.patch(PATH, data={"weights": "1"}), 400)["code"] == "unsupported_content_type"
    large = await caller.http.patch(PATH, json={"weights": {"n" * 70_000: 1}})
    assert fault(large, 413)["code"] == "too_large"
    packed = gzip.compress(b"[" + b" " * 10_000_000)
    assert fault(await caller.http.patch(PATH, content=packed, headers={"content-encoding": "gzip"}), 413)
    assert fault(await caller.http.patch(PATH, content=b"{}", headers={"content-encoding": "br"}), 415)
    packed = gzip.compress(b'{"weights": {"next": 1}}')
    assert (await caller.http.patch(PATH, content=packed, headers={"content-encoding": "gzip"})).status_code == 200
    assert len(control.asked) == 1


async def test_a_store_that_does_not_answer_is_503(caller, control):
    control.fault = Unavailable("the store of the variants cannot be written", cause="/etc/secret is read-only")
    said = await caller.http.patch(PATH, json={"weights": {"next": 1}})
    assert fault(said, 503)["code"] == "unavailable"
    assert "/etc/secret" not in said.text


async def test_a_service_without_variants_has_none_to_show_and_none_to_change(keys):
    caller = Caller(House(keys=str(keys.path)))
    caller.http.headers.update(bearer(keys.make("ops", frozenset({Scope.ADMIN}))))
    await caller.house.gate.look()
    assert (await caller.http.get(PATH)).json() == {"object": "list", "data": []}
    error = fault(await caller.http.patch(PATH, json={"weights": {"next": 1}}), 404)
    assert error["code"] == "no_variants"
    await caller.close()


async def test_another_method_is_told_every_method_of_the_path(caller):
    for method, path, allowed in (
        ("OPTIONS", PATH, "GET, HEAD, PATCH"),
        ("DELETE", PATH, "GET, HEAD, PATCH"),
        ("GET", "/v1/vqa", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PATCH", "/v1/images/img_0", "DELETE"),
    ):
        said = await caller.http.request(method, path)
        assert (said.status_code, said.headers["allow"]) == (405, allowed)


async def test_openapi_describes_both(caller):
    spec = (await caller.http.get("/openapi.json")).json()
    get, patch = spec["paths"][PATH]["get"], spec["paths"][PATH]["patch"]
    for operation in (get, patch):
        answer = operation["responses"]["200"]["content"]["application/json"]
        assert answer["schema"] == {"$ref": "#/components/schemas/VariantList"}
        assert {"401", "403"} <= operation["responses"].keys()
    assert {"400", "404", "408", "413", "415", "503"} <= patch["responses"].keys()
    body = spec["components"]["schemas"]["VariantsUpdate"]
    assert (body["additionalProperties"], body["minProperties"]) == (False, 1)
    assert body["properties"]["weights"]["additionalProperties"] == {
        "type": "number",
        "minimum": 0.0,
        "maximum": 1_000_000.0,
    }
