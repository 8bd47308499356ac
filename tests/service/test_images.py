"""Ids of images: one tenant's alone, known to every gateway with Redis, and deleted everywhere."""

from __future__ import annotations

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from service.access.key_redis import KeysInRedis
from service.access.keys import Limits
from service.cache import shared_images
from service.cache.keys import FeatureKey
from service.cache.redis_tier import flight_key
from service.cache.shared_images import DELETED, LATE_S, OVERLAP_S, image_in, key_of, record_of
from service.core.errors import Overloaded, TooLarge
from service.core.vision import IMAGE_SIZE
from service.images import READS, InUse
from service.media.store import Image, address_of
from service.settings import IMAGE_ENTRY_BYTES
from service.upstreams.store import VariantsInRedis
from service.upstreams.variants import Variant
from tests.service.edges.http.test_vqa import ASKED, Caller, fault
from tests.support.fakes import CARD, CLOSER, House, cancelled, png, until
from tests.support.keys import Keys, bearer
from tests.support.paths import PROJECT
from tests.support.servers import RedisServer

SECRET, OTHER = png((1, 2, 3)), png((3, 2, 1))


class Asking(Caller):
    """A client of a service without Triton, as one tenant or with one key."""

    async def send(self, data: bytes, headers: dict[str, str] | None = None) -> str:
        response = await self.http.post("/v1/images", content=data, headers=headers)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    async def about(self, image: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return await self.http.post("/v1/vqa", json=ASKED | {"image": image}, headers=headers)


@asynccontextmanager
async def calling(**settings: object) -> AsyncIterator[Asking]:
    caller = Asking(House(**settings))
    house, running = caller.house, []
    if house.shared is not None:
        running = [
            house.shared.run(),
            house.quotas.run(),
            *([house.shared_images.run()] if house.shared_images else []),
        ]
        running = [asyncio.create_task(each) for each in running]
        await until(lambda: house.shared.in_use)
    try:
        yield caller
    finally:
        for task in running:
            await cancelled(task)
        await caller.close()


@asynccontextmanager
async def two_gateways(redis: RedisServer, **settings: object) -> AsyncIterator[tuple[Asking, Asking]]:
    told = {"redis_url": redis.url, "redis_timeout_s": 5.0, **settings}
    async with calling(**told) as one, calling(**told) as two:
        yield one, two


async def shares(caller: Asking, headers: dict[str, str] | None = None) -> bool:
    return bool((await caller.http.get("/v1/models", headers=headers)).json()["data"][0]["images_shared"])


async def test_an_image_sent_to_one_gateway_is_asked_about_at_the_other(redis_server):
    async with two_gateways(redis_server) as (one, two):
        assert await shares(one)
        image = await one.send(SECRET)
        assert (await two.about(image)).json()["image_ids"] == [image]
        asked = (await one.ask(image="data:image/png;base64," + ASKED["image"])).json()["image_ids"][0]
        await until(lambda: redis_server.client.exists(key_of(address_of("", asked))))
        assert (await two.about(asked)).status_code == 200
        assert two.house.counted("glimpse_image_lookups_total", tier="redis", result="hit") == 2
        assert (await two.about(image)).status_code == 200  # from memory now
        assert two.house.counted("glimpse_image_lookups_total", tier="redis", result="hit") == 2
        assert redis_server.client.pttl(key_of(address_of("", image))) <= 3_600_000


async def test_an_id_leads_another_tenant_nowhere(redis_server, tmp_path: Path):
    keys = Keys(tmp_path)
    ours, theirs = bearer(keys.make("acme")), bearer(keys.make("other"))
    async with two_gateways(redis_server, keys=str(keys.path)) as (one, two):
        image = await one.send(SECRET, ours)
        unknown = fault(await two.about("img_" + "0" * 32, theirs), 404)
        for caller in (one, two):
            error = fault(await caller.about(image, theirs), 404)
            assert error["code"] == "image_not_found"
            assert error["message"] == unknown["message"].replace("img_" + "0" * 32, image)
            fault(await caller.http.delete(f"/v1/images/{image}", headers=theirs), 404)
        assert (await two.about(image, ours)).status_code == 200
        # The same bytes of another tenant: an id and features of its own.
        asked = await one.http.post("/v1/vqa", json=ASKED, headers=ours)
        other = await one.http.post("/v1/vqa", json=ASKED, headers=theirs)
        assert asked.json()["image_ids"] != other.json()["image_ids"]
        assert [each.json()["vision"]["cache"] for each in (asked, other)] == ["miss", "miss"]


async def test_tenants_share_features_if_it_is_set(tmp_path: Path):
    keys = Keys(tmp_path)
    ours, theirs = bearer(keys.make("acme")), bearer(keys.make("other"))
    async with calling(keys=str(keys.path), share_features=True) as caller:
        answers = [await caller.http.post("/v1/vqa", json=ASKED, headers=headers) for headers in (ours, theirs)]
        assert [each.json()["vision"]["cache"] for each in answers] == ["miss", "hit"]
        assert answers[0].json()["image_ids"] != answers[1].json()["image_ids"]


@pytest.mark.parametrize(("path", "told"), [("/v1/images", {}), ("/v1/files", {"object": "file"})])
async def test_a_deleted_image_is_gone_in_every_gateway(redis_server, path, told):
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        assert (await two.about(image)).status_code == 200
        gone = await one.http.delete(f"{path}/{image}")
        assert gone.json() == {"id": image, "deleted": True} | told
        fault(await one.about(image), 404)
        await until(lambda: two.house.pipeline.images.store.get(image, 0.0) is None)
        fault(await two.about(image), 404)
        fault(await one.http.delete(f"{path}/{image}"), 404)
        again = await one.send(SECRET)
        assert again != image
        assert (await two.about(again)).status_code == 200


async def test_deletions_that_are_remembered_are_bounded(redis_server, monkeypatch):
    """Else a caller could fill Redis, and every gateway, with ids that it makes up."""
    monkeypatch.setattr(shared_images, "MOST_DELETED", 3)
    async with two_gateways(redis_server) as (one, two):
        for number in range(8):
            fault(await one.http.delete(f"/v1/images/img_{number:032x}"), 404)
        assert redis_server.client.zcard(DELETED) == 3
        image = await two.send(SECRET)
        redis_server.client.delete(key_of(address_of("", image)))
        assert two.house.pipeline.images.store.get(image, 0.0) is not None  # only the other gateway's memory has it
        fault(await one.http.delete(f"/v1/images/{image}"), 404)
        await until(lambda: two.house.pipeline.images.store.get(image, 0.0) is None)
        assert redis_server.client.zcard(DELETED) == 3


async def test_an_image_that_is_looked_at_closely_is_written_to_redis_once(redis_server, monkeypatch):
    async with calling(card=CLOSER, redis_url=redis_server.url, redis_timeout_s=5.0) as caller:
        written = []
        monkeypatch.setattr(caller.house.shared_images, "put_behind", lambda address, data: written.append(address))
        answer = (await caller.ask(detail="high")).json()
        assert answer["vision"]["detail"] == "high"
        assert written == [address_of("", answer["image_ids"][0])]


async def test_images_are_dropped_only_while_too_many_bytes_wait_to_be_written(redis_server, monkeypatch):
    monkeypatch.setattr(shared_images, "MOST_UNWRITTEN_BYTES", 2 * len(SECRET))
    async with calling(redis_url=redis_server.url, redis_timeout_s=5.0) as caller:
        shared = caller.house.shared_images

        def written(result: str) -> float:
            return caller.house.counted("glimpse_image_writes_total", result=result)

        for turn in range(3):
            for number in range(3):
                shared.put_behind(f"{turn}-{number}", SECRET)
            await until(lambda turn=turn: written("kept") == 2 * turn + 2)
            assert written("dropped") == turn + 1
        keys = {key.decode() for key in redis_server.client.keys("glimpse:1:image:*")}
        assert keys == {key_of(f"{turn}-{number}") for turn in range(3) for number in range(2)}


async def test_a_deletion_by_a_gateway_whose_clock_is_late_is_noticed(redis_server):
    async with calling(redis_url=redis_server.url, redis_timeout_s=5.0) as caller:
        images = caller.house.pipeline.images
        image = await caller.send(SECRET)
        await caller.house.shared_images.look()
        redis_server.client.zadd(DELETED, {address_of("", image): time.time() - OVERLAP_S + 5})
        await until(lambda: images.store.get(image, 0.0) is None)


async def test_a_deletion_is_remembered_longer_than_an_image_that_another_gateway_puts_back_late(redis_server):
    async with calling(redis_url=redis_server.url, redis_timeout_s=5.0, image_ttl_s=100) as caller:
        now, shared = time.time(), caller.house.shared_images
        redis_server.client.zadd(DELETED, {"late": now - 100 - LATE_S + 20, "over": now - 100 - LATE_S - 20})
        await shared.delete("now")
        assert set(redis_server.client.zrange(DELETED, 0, -1)) == {b"late", b"now"}
        assert redis_server.client.pttl(DELETED) == pytest.approx(1e3 * (100 + LATE_S), abs=10_000)
        redis_server.client.set(key_of("late"), record_of("late", SECRET))
        assert await shared.find("late") is None


async def test_without_redis_ids_are_this_gateways_and_it_says_so():
    async with calling() as caller:
        assert not await shares(caller)
        image = await caller.send(SECRET)
        assert await caller.send(SECRET) == image
        assert (await caller.about(image)).status_code == 200
        assert (await caller.http.delete(f"/v1/images/{image}")).status_code == 200
        assert "did not send it to this server" in fault(await caller.about(image), 404)["message"]


async def test_images_can_be_kept_out_of_redis(redis_server):
    async with two_gateways(redis_server, share_images=False) as (one, two):
        assert not await shares(one)
        fault(await two.about(await one.send(SECRET)), 404)
        assert not redis_server.client.keys("glimpse:1:image:*")


async def test_a_redis_that_is_gone_is_no_outage(redis_server):
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        redis_server.kill()
        kept = await one.send(png((9, 9, 9)))
        assert (await one.about(image)).status_code == (await one.about(kept)).status_code == 200
        assert "does not answer" in fault(await two.about(image), 503)["message"]
        await until(lambda: not one.house.shared.in_use and not two.house.shared.in_use)
        assert "to this server" in fault(await two.about(image), 404)["message"]
        assert not await shares(one)
        error = fault(await one.http.delete(f"/v1/images/{image}"), 503)
        assert "wait until it expires" in error["message"]
        fault(await one.about(image), 404)


async def test_a_record_that_does_not_fit_is_a_miss_and_deleted(redis_server):
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        key = key_of(address_of("", image))
        redis_server.client.set(key, b"GLI1" + b"x" * 100)
        fault(await two.about(image), 404)
        assert two.house.counted("glimpse_redis_bad_records_total", reason="image") == 1
        assert not redis_server.client.exists(key)


def test_a_record_belongs_to_its_address():
    record = record_of("a", b"image")
    assert image_in(record, "a") == b"image"
    for wrong in (record[:-1], record + b"x", b"", b"GLI1", record.replace(b"GLI1", b"GLI2")):
        assert image_in(wrong, "a") is None
    assert image_in(record, "b") is None


async def test_redis_holds_no_id_and_no_tenant(redis_server):
    async with two_gateways(redis_server) as (one, _):
        headers = {"x-tenant-id": "acme"}
        image = await one.send(SECRET, headers)
        await one.http.delete(f"/v1/images/{await one.send(png((7, 7, 7)), headers)}", headers=headers)
        keys = b" ".join([*redis_server.client.keys("*"), *redis_server.client.zrange(DELETED, 0, -1)])
        assert image.encode() not in keys
        assert b"acme" not in keys


async def test_questions_that_find_an_image_in_redis_at_once_share_its_bytes(redis_server):
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        images = two.house.pipeline.images
        with ExitStack() as held:
            uses = [InUse(images, "", held) for _ in range(20)]
            found = await asyncio.gather(*(use.find(image) for use in uses))
            assert len({id(each.data) for each in found}) == 1
            assert images.store.held_bytes == images.store.nbytes == len(SECRET) + IMAGE_ENTRY_BYTES
        assert images.store.held_bytes == 0
        assert two.house.counted("glimpse_image_lookups_total", tier="redis", result="hit") <= READS


async def test_images_in_redis_that_have_no_room_here_are_refused(redis_server):
    one_image = len(SECRET) + IMAGE_ENTRY_BYTES
    async with two_gateways(redis_server, image_store_bytes=one_image, max_image_bytes=len(SECRET)) as (one, two):
        first, second = await one.send(SECRET), await one.send(OTHER)
        store = two.house.pipeline.images.store
        with ExitStack() as held:
            use = InUse(two.house.pipeline.images, "", held)
            assert (await use.find(first)).data == SECRET
            with pytest.raises(Overloaded, match="limit of images that requests look at"):
                await InUse(two.house.pipeline.images, "", held).find(second)
            with pytest.raises(TooLarge, match=f"more than the {one_image:,} bytes"):
                await use.find(second)
            kept = await two.send(OTHER)  # Redis has room
            assert store.held_bytes == store.nbytes
            assert (await one.about(kept)).status_code == 200
        both = {"images": [first, second], "question": "what?"}
        response = await two.http.post("/v1/vqa", json=both)
        assert fault(response, 413)["param"] == "images.1"
        assert (await two.about(second)).status_code == 200
        assert store.held_bytes == 0


async def test_an_upload_that_cannot_be_kept_is_refused_before_it_is_decoded():
    one_image = len(SECRET) + IMAGE_ENTRY_BYTES
    async with calling(image_store_bytes=one_image, max_image_bytes=len(SECRET)) as caller:
        image = await caller.send(SECRET)
        images = caller.house.pipeline.images
        with ExitStack() as held:
            await InUse(images, "", held).find(image)
            caller.house.reader.close()
            refused = await caller.http.post("/v1/images", content=OTHER)
            assert fault(refused, 429)["code"] == "saturated"
            assert refused.headers["retry-after"] == "1"
            estimate = await caller.http.post("/v1/vqa/estimate", json=ASKED | {"image": image})
            assert estimate.json()["admitted"]
        assert images.store.held_bytes == 0
        told = (await caller.http.get("/metrics")).text
        assert "glimpse_images_held_bytes 0.0" in told


async def test_an_image_that_is_deleted_while_its_question_is_answered_stays_deleted():
    async with calling() as caller:
        image, sent = await caller.send(SECRET), "data:image/png;base64," + b64encode(SECRET).decode()
        caller.house.vision.gate.clear()
        asking = asyncio.create_task(caller.ask(image=sent))
        await until(lambda: caller.house.vision.calls)
        assert (await caller.http.delete(f"/v1/images/{image}")).status_code == 200
        caller.house.vision.gate.set()
        assert (await asking).json()["image_ids"] == [image]
        fault(await caller.about(image), 404)
        assert (await caller.ask(image=sent)).json()["image_ids"] != [image]


async def test_a_deletion_overtakes_an_image_on_its_way_to_redis(redis_server):
    async with two_gateways(redis_server) as (one, two):
        shared, sent = one.house.shared_images, []
        wait, put = asyncio.Event(), shared.put

        async def slow(address: str, data: bytes) -> bool:
            await wait.wait()
            was_put = await put(address, data)
            sent.append(address)
            return was_put

        shared.put = slow
        asked = [await one.ask(image="data:image/png;base64," + b64encode(each).decode()) for each in (OTHER, SECRET)]
        ids = [each.json()["image_ids"][0] for each in asked]
        for image in ids:
            assert (await one.http.delete(f"/v1/images/{image}")).status_code == 200
        wait.set()
        await until(lambda: len(sent) == 2)
        await until(lambda: not redis_server.client.keys("glimpse:1:image:*"))
        fault(await two.about(ids[1]), 404)


async def test_what_another_gateway_puts_back_after_a_deletion_is_not_found(redis_server, monkeypatch):
    monkeypatch.setattr(shared_images, "LOOK_INTERVAL_S", 60.0)
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        key = key_of(address_of("", image))
        record = redis_server.client.get(key)
        assert (await one.http.delete(f"/v1/images/{image}")).status_code == 200
        redis_server.client.set(key, record)
        fault(await two.about(image), 404)
        assert not redis_server.client.exists(key)
        assert two.house.counted("glimpse_redis_bad_records_total", reason="image") == 0


async def test_an_image_that_is_deleted_while_it_is_read_from_redis_is_not_kept(redis_server):
    async with two_gateways(redis_server) as (one, two):
        image = await one.send(SECRET)
        reader, wait, begun = two.house.reader, asyncio.Event(), asyncio.Event()
        identify = reader.identify

        async def slow(data: bytes) -> Image:
            begun.set()
            await wait.wait()
            return await identify(data)

        reader.identify = slow
        asking = asyncio.create_task(two.about(image))
        await begun.wait()
        assert (await one.http.delete(f"/v1/images/{image}")).status_code == 200
        await until(lambda: two.house.pipeline.images.store.is_deleted(address_of("", image)))
        wait.set()
        fault(await asking, 404)
        assert len(two.house.pipeline.images.store) == 0


async def test_an_upload_whose_id_another_gateway_deleted_has_a_new_one(redis_server, monkeypatch):
    monkeypatch.setattr(shared_images, "LOOK_INTERVAL_S", 60.0)
    async with two_gateways(redis_server) as (one, two):
        image = await two.send(SECRET)
        assert (await one.http.delete(f"/v1/images/{image}")).status_code == 200
        again = await two.send(SECRET)
        assert again != image
        assert (await one.about(again)).status_code == 200
        assert (await two.about(again)).status_code == 200
        assert not redis_server.client.exists(key_of(address_of("", image)))


async def test_a_fault_of_our_own_does_not_end_the_looks_for_deleted_images(redis_server, monkeypatch):
    monkeypatch.setattr(shared_images, "LOOK_INTERVAL_S", 0.01)
    async with two_gateways(redis_server) as (one, _):
        looks: list[int] = []

        async def failing() -> None:
            looks.append(1)
            raise AttributeError("no Redis replies so")

        monkeypatch.setattr(one.house.shared_images, "look", failing)
        await until(lambda: len(looks) > 2)


async def test_a_deletion_while_redis_takes_the_image_deletes_it_again(redis_server):
    async with two_gateways(redis_server) as (one, _):
        shared, address = one.house.shared_images, address_of("", "img_" + "1" * 32)
        ask = shared._ask

        async def deleted_meanwhile(lane: object, *commands: tuple[object, ...]) -> object:
            replies = await ask(lane, *commands)
            if commands[0][0] == "SET":
                one.house.pipeline.images.store.forget(address)
            return replies

        shared._ask = deleted_meanwhile
        assert not await shared.put(address, SECRET)
        assert not redis_server.client.exists(key_of(address))


async def test_ids_that_no_image_can_have_are_not_remembered_as_deleted():
    async with calling() as caller:
        fault(await caller.http.delete("/v1/images/img_x"), 404)
        assert not caller.house.pipeline.images.store.is_deleted(address_of("", "img_x"))


async def test_a_redis_user_who_may_not_read_images_is_no_outage(redis_server):
    rights = ("~glimpse:*", "-@all", "+get", "+set", "+unlink", "+eval")  # those for features
    redis_server.client.execute_command("ACL", "SETUSER", "glimpse", "on", ">word", *rights)
    url = redis_server.url.replace("redis://", "redis://glimpse:word@")
    async with calling(redis_url=url, redis_timeout_s=5.0) as caller:
        assert caller.house.shared.in_use
        fault(await caller.about("img_" + "0" * 32), 404)
        assert caller.house.counted("glimpse_image_lookups_total", tier="redis", result="failed") == 1


async def test_the_documented_rights_suffice_for_all_that_is_in_redis(redis_server):
    """Of a Redis user who may do what docs/operations.md says, and nothing else."""
    told = (PROJECT / "docs" / "operations.md").read_text()
    words = re.findall(
        r"\b[A-Z]{3,}\b", told[told.index("The user of `GLIMPSE_REDIS_URL` needs") :].partition("\n- ")[0]
    )
    assert {"ZSCORE", "EVALSHA", "HDEL"} <= set(words)
    allowed = [f"+{word.lower()}" for word in words if word != "GLIMPSE"]
    redis_server.client.execute_command("ACL", "SETUSER", "glimpse", "on", ">word", "~glimpse:*", "-@all", *allowed)
    url = redis_server.url.replace("redis://", "redis://glimpse:word@")
    quotas = {"quota_requests_per_minute": 100, "quota_concurrent_requests": 5}
    settings = {"redis_url": url, "redis_timeout_s": 5.0, "redis_flight_s": 600, **quotas}
    async with calling(**settings) as one, calling(**settings) as two:
        image = await one.send(SECRET)
        assert (await two.about(image)).status_code == 200
        assert (await one.http.delete(f"/v1/images/{image}")).status_code == 200
        await until(lambda: two.house.pipeline.images.store.is_deleted(address_of("", image)))
        assert not redis_server.client.keys("glimpse:1:image:*")
        shared, key = one.house.shared, FeatureKey(CARD.fingerprint, IMAGE_SIZE, Image.of(OTHER).digest)
        assert await shared.find(key, 0.0) is None
        assert redis_server.client.exists(flight_key(key))
        shared.give_up(key)
        await until(lambda: not redis_server.client.keys("glimpse:1:flight:*"))  # the answered question's neither
        await until(lambda: one.house.counted("glimpse_quota_gateways") == 2)
        metrics = (await one.http.get("/metrics")).text + (await two.http.get("/metrics")).text
        faults = [line for line in metrics.splitlines() if line.startswith("glimpse_redis_errors_total{")]
        assert not [line for line in faults if not line.endswith(" 0.0")]
        assert metrics.count("glimpse_quota_is_local 0.0") == 2
    await keep_keys(KeysInRedis(url))
    variant = Variant.parse("stable", {"models": "/models", "tritons": ["triton:8001"]})
    await VariantsInRedis(url).change(lambda before: before.replaced(variant))
    assert "stable" in (await VariantsInRedis(url).loaded()).variants


async def keep_keys(keys: KeysInRedis) -> None:
    """Keep and remove what `glimpse keys` keeps and removes."""
    await keys.change(lambda before: replace(before, tenants={"acme": Limits(1)}))
    assert (await keys.loaded()).tenants == {"acme": Limits(1)}
    await keys.change(lambda before: replace(before, tenants={}))
    assert (await keys.loaded()).tenants == {}
