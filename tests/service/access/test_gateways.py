"""Two real gateways with one Redis and one file of keys, in front of the session's Triton."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.guesses import measure, world
from service.access.keys import Limits
from service.core.access import Scope
from service.triton_server.supervision import EmbeddedTriton
from tests.support.fakes import png
from tests.support.keys import Keys, bearer
from tests.support.servers import Gateway, RedisServer, StartGateway, eventually_async

pytestmark = [pytest.mark.needs("redis-server"), pytest.mark.slow]

QUESTION = {"question": "how many objects are there?", "max_tokens": 4}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def gateways(
    start_gateway: StartGateway, triton: EmbeddedTriton, keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Gateway, Gateway]]:
    redis, url = RedisServer(tmp_path_factory.mktemp("redis")), triton.access.url
    redis.start()
    told = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_REDIS_URL": redis.url}
    told |= {"GLIMPSE_KEYS": str(keys.path), "GLIMPSE_REDIS_TIMEOUT_S": "2"}  # the machine may be busy
    with start_gateway(told) as one, start_gateway(told) as two:
        yield one, two
    redis.kill()


@pytest_asyncio.fixture
async def callers(gateways: tuple[Gateway, Gateway]) -> AsyncIterator[list[httpx.AsyncClient]]:
    clients = [httpx.AsyncClient(base_url=each.url, timeout=60, trust_env=False) for each in gateways]
    yield clients
    for each in clients:
        await each.aclose()


async def in_use(callers: list[httpx.AsyncClient], key: str) -> None:
    """Wait until every gateway knows the key: without a restart."""
    for caller in callers:

        async def knows(caller: httpx.AsyncClient = caller) -> bool:
            return (await caller.get("/v1/models", headers=bearer(key))).status_code == 200

        await eventually_async(knows, 10, "the key is in use")


async def test_an_image_sent_to_one_gateway_is_asked_about_at_the_other(callers, keys):
    ours, theirs = keys.make("acme"), keys.make("other")
    await in_use(callers, theirs)
    one, two = callers
    image = (await one.post("/v1/images", content=png((1, 2, 3)), headers=bearer(ours))).json()["id"]
    said = await two.post("/v1/vqa", json=QUESTION | {"image": image}, headers=bearer(ours))
    assert said.status_code == 200, said.text
    assert said.json()["image_ids"] == [image]
    assert (await two.post("/v1/vqa", json=QUESTION | {"image": image}, headers=bearer(theirs))).status_code == 404
    assert (await one.delete(f"/v1/images/{image}", headers=bearer(ours))).status_code == 200

    async def gone() -> bool:
        asked = await two.post("/v1/vqa", json=QUESTION | {"image": image}, headers=bearer(ours))
        return asked.status_code == 404

    await eventually_async(gone, 10, "the image is forgotten")


async def test_a_quota_of_100_a_minute_lets_100_through_over_both(callers, keys):
    keys.limit("busy", Limits(requests_per_minute=100))
    key = keys.make("busy")
    await in_use(callers, key)
    found: Counter[int] = Counter()
    for start in range(0, 130, 10):
        sent = (
            callers[number % 2].post("/v1/images", content=png((5, 5, 5), (8, 8)), headers=bearer(key))
            for number in range(start, start + 10)
        )
        found.update(response.status_code for response in await asyncio.gather(*sent))
    assert 98 <= found[200] <= 102
    assert found[200] + found[429] == 130


async def test_a_revoked_key_soon_ends_at_all_gateways(callers, keys):
    key = keys.make("short")
    await in_use(callers, key)
    keys.revoke(key)
    for caller in callers:

        async def refused(caller: httpx.AsyncClient = caller) -> bool:
            return (await caller.get("/v1/models", headers=bearer(key))).status_code == 401

        await eventually_async(refused, 10, "the key is refused")


async def test_the_metrics_tell_of_keys_and_quotas(callers, keys):
    reader = keys.make("ops", frozenset({Scope.METRICS}))
    await in_use(callers, reader)
    await callers[0].get("/v1/models", headers=bearer("glk_00000000_wrong"))
    text = (await callers[0].get("/metrics", headers=bearer(reader))).text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["glimpse_keys",] == len(keys.ring.keys)
    assert samples["glimpse_keys_readable",] == 1
    assert samples["glimpse_keys_refused_total", "invalid_api_key"] >= 1
    assert samples["glimpse_quota_is_local",] == 0


async def test_guesses_of_keys_and_ids_are_all_wrong(callers, keys, gateways):
    guesser, victim = keys.make("guesser"), keys.make("victim")
    await in_use(callers, victim)
    figures = await asyncio.to_thread(lambda: measure(world(gateways[1].url, guesser, victim), 200, warm_up=0))
    assert [pair["right"] for pair in figures.values()] == [0, 0]
    assert sum(pair["guesses"] for pair in figures.values()) == 200


async def test_no_key_is_in_a_gateways_log(callers, keys, gateways):
    key = keys.make("acme")
    await in_use(callers, key)
    await callers[0].post("/v1/vqa", json=QUESTION | {"image": "img_0"}, headers=bearer(key))
    await callers[0].post("/v1/vqa", json=QUESTION, headers={"x-api-key": key, "x-tenant-id": "other"})
    assert key[13:] not in gateways[0].log()


def test_the_file_is_the_operators_alone(keys: Keys):
    assert Path(keys.path).stat().st_mode & 0o077 == 0
