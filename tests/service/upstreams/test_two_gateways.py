"""Two real gateways that follow one file of variants, changed through one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.core.access import Scope
from service.triton_server.supervision import EmbeddedTriton
from service.upstreams.variants import Variant, Variants
from tests.support.fakes import png
from tests.support.keys import Keys, bearer
from tests.support.servers import Gateway, StartGateway, eventually_async

pytestmark = pytest.mark.slow

PATH = "/v1/variants"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def admin(keys: Keys) -> str:
    return keys.make("ops", frozenset({Scope.ADMIN}))


@pytest.fixture(scope="module")
def asker(keys: Keys) -> str:
    return keys.make("acme")


@pytest.fixture(scope="module")
def gateways(
    start_gateway: StartGateway,
    triton: EmbeddedTriton,
    repository: Path,
    admin: str,
    asker: str,
    keys: Keys,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gateway, Gateway]]:
    file, address = tmp_path_factory.mktemp("variants") / "variants.json", (triton.access.url,)
    names = {"stable": 95.0, "next": 5.0}
    file.write_bytes(
        Variants(
            {name: Variant(name, str(repository), address, address, part) for name, part in names.items()}
        ).to_json()
    )
    told = {"GLIMPSE_VARIANTS": str(file), "GLIMPSE_KEYS": str(keys.path)}
    with start_gateway(told) as one, start_gateway(told) as two:
        yield one, two


@pytest_asyncio.fixture
async def callers(gateways: tuple[Gateway, Gateway], admin: str) -> AsyncIterator[list[httpx.AsyncClient]]:
    clients = [
        httpx.AsyncClient(base_url=each.url, timeout=60, trust_env=False, headers=bearer(admin)) for each in gateways
    ]
    yield clients
    for each in clients:
        await each.aclose()


async def split_of(caller: httpx.AsyncClient) -> dict[str, tuple[float, bool]]:
    said = await caller.get(PATH)
    assert said.status_code == 200, said.text
    return {each["name"]: (each["weight"], each["draining"]) for each in said.json()["data"]}


async def changed(caller: httpx.AsyncClient, **change: Any) -> httpx.Response:
    return await caller.patch(PATH, json=change)


async def test_a_change_at_one_gateway_is_soon_in_use_at_both(callers, gateways, keys):
    one, two = callers
    assert await split_of(two) == {"stable": (95, False), "next": (5, False)}
    said = await changed(one, weights={"stable": 1, "next": 3})
    assert said.status_code == 200, said.text
    assert [(each["name"], each["share"]) for each in said.json()["data"]] == [("stable", 0.25), ("next", 0.75)]
    for caller in callers:

        async def follows(caller: httpx.AsyncClient = caller) -> bool:
            return await split_of(caller) == {"stable": (1, False), "next": (3, False)}

        await eventually_async(follows, 10, "the gateway follows")
    (line,) = [line for line in gateways[0].log().splitlines() if "variants_changed" in line]
    (ops,) = [record.id for record in keys.ring.keys.values() if record.tenant == "ops"]
    assert "ops" in line
    assert ops in line
    assert "stable=95 next=5" in line
    assert "stable=1 next=3" in line


async def test_a_drained_variant_answers_nobody_at_either_gateway(callers, asker):
    one, two = callers
    assert (await changed(two, draining={"next": True})).status_code == 200

    async def drains(wanted: bool) -> bool:
        return all([(await split_of(caller))["next"][1] is wanted for caller in callers])

    await eventually_async(lambda: drains(True), 10, "both gateways drain it")
    for caller in callers:
        asked = await caller.post(
            "/v1/vqa",
            files={"image": png()},
            data={"question": "which colour?", "max_tokens": "2"},
            headers=bearer(asker) | {"x-glimpse-variant": "next"},
        )
        assert (asked.status_code, asked.json()["error"]["code"]) == (400, "unknown_variant")
    assert (await changed(one, draining={"next": False})).status_code == 200
    await eventually_async(lambda: drains(False), 10, "both gateways use it again")


async def test_a_key_that_may_ask_may_not_look_or_change(callers, asker):
    before = await split_of(callers[0])
    for method in ("GET", "PATCH"):
        for caller in callers:
            body = {"weights": {"stable": 7}}
            assert (await caller.request(method, PATH, json=body, headers=bearer(asker))).status_code == 403
            assert (await caller.request(method, PATH, json=body, headers=bearer("glk_0"))).status_code == 401
    assert await split_of(callers[0]) == before


async def test_a_wrong_change_changes_nothing(callers):
    before = await split_of(callers[0])
    for change, status in (
        ({"weights": {"stable": 7, "nobody": 1}}, 404),
        ({"weights": {"stable": 0, "next": 0}}, 400),
        ({"weights": {"stable": 7}, "draining": {"stable": True, "next": True}}, 400),
        ({"weight": {"stable": 7}}, 400),
    ):
        assert (await changed(callers[0], **change)).status_code == status, change
    assert await split_of(callers[0]) == before
