"""Gateways with stand-ins for the models that share a real redis-server, and everything that can happen to it.

Whatever that is: every request is answered, none waits much longer than GLIMPSE_REDIS_TIMEOUT_S, and metrics show it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from redis.crc import key_slot
from structlog.testing import capture_logs

from service.cache import admin as cache_admin
from service.cache import redis_tier
from service.cache.keys import FeatureKey
from service.cache.records import pack
from service.cache.redis_client import Command, Lane, RedisFault, Reply
from service.cache.redis_tier import MOST_UNWRITTEN, flight_key, record_key
from service.core.answer import Finished
from service.core.card import ModelCard
from service.core.errors import ShuttingDown
from service.core.request import Budget, ImageBytes, Priority, Request, Sampling, Text
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE, CloserFeatures, Int8Rows
from service.media.store import Image
from tests.support.fakes import CARD, CLOSER, House, cancelled, png, turns, until
from tests.support.servers import RedisServer, StartRedis, eventually, eventually_async, free_ports

SLACK_S = 9.0  # what a busy machine may add
STUCK_S = 60.0  # what does not come about within this time never will
PATIENT = 5.0  # for tests in which Redis is well: a busy machine must not look like a slow Redis


@pytest.fixture
def patient_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without a limit of its own would wait longer than SLACK_S for a Redis that does not answer."""
    monkeypatch.setattr(redis_tier, "LANE_TIMEOUT_S", 3 * SLACK_S)


@asynccontextmanager
async def gateway(url: str, card: ModelCard = CARD, *, in_use: bool = True, **knobs: object) -> AsyncIterator[House]:
    """Without a memory of its own, unless `knobs` say so: every question asks Redis."""
    house = House(card, redis_url=url, **{"feature_cache_bytes": 0, "redis_timeout_s": PATIENT, **knobs})
    assert house.shared is not None
    running = asyncio.create_task(house.shared.run())
    try:
        if in_use:
            await until(lambda: not house.shared.breaker.is_open, 10)
        yield house
    finally:
        await cancelled(running)
        house.reader.close()


@cache
def image(number: int) -> bytes:
    return png((number % 256, number // 256, 7))


def key(number: int) -> FeatureKey:
    return FeatureKey(CARD.fingerprint, IMAGE_SIZE, Image.of(image(number)).digest)


async def ask(house: House, number: int, timeout_s: float = 30.0, **more: object) -> str:
    """`hit` or `miss`; the answer is always the same."""
    request = Request("vqa_1", (ImageBytes(image(number)), Text("what?")), Budget(), Sampling(), timeout_s, **more)
    *_, last = [event async for event in house.answer(request)]
    assert isinstance(last, Finished)
    return last.cache


async def timed(house: House, number: int) -> tuple[str, float]:
    begun = time.monotonic()
    return await ask(house, number), time.monotonic() - begun


def lookups(house: House, tier: str = "redis") -> dict[str, float]:
    """Those that happened."""
    every = ("hit", "miss", "shared", "failed", "skipped")
    counts = {r: house.counted("glimpse_feature_cache_lookups_total", tier=tier, result=r) for r in every}
    return {result: count for result, count in counts.items() if count}


def writes(house: House, result: str) -> float:
    return house.counted("glimpse_feature_cache_writes_total", result=result)


def errors(house: House, kind: str) -> float:
    return house.counted("glimpse_redis_errors_total", kind=kind)


async def kept(house: House, count: int) -> None:
    await until(lambda: writes(house, "kept") == count, STUCK_S)


async def test_what_one_gateway_encoded_another_finds_bit_for_bit(redis_server):
    async with gateway(redis_server.url) as one, gateway(redis_server.url, feature_cache_bytes=10**6) as other:
        assert await ask(one, 1) == "miss"
        await kept(one, 1)
        async with one.pipeline.features.find(key(1)) as first, other.pipeline.features.find(key(1)) as second:
            assert first.features is not second.features
            for name in CARD.feature_shapes[IMAGE_SIZE]:
                assert (getattr(first.features, name) == getattr(second.features, name)).all()
        assert [await ask(other, 1), await ask(other, 1)] == ["hit", "hit"]
        assert lookups(one) == {"miss": 1, "hit": 1}
        assert lookups(other) == {"hit": 1}
        assert lookups(other, "memory") == {"miss": 1, "hit": 2}
        assert other.vision.calls == ["attend", "attend"]


async def test_gateways_that_keep_int8_share_it_and_others_do_not_see_it(redis_server):
    int8 = {"feature_cache_dtype": "int8"}
    async with (
        gateway(redis_server.url, **int8) as one,
        gateway(redis_server.url, **int8) as other,
        gateway(redis_server.url) as full,
    ):
        assert await ask(one, 1) == "miss"
        await kept(one, 1)
        assert await ask(other, 1) == "hit"
        assert await ask(full, 1) == "miss"
        await kept(full, 1)
        async with one.pipeline.features.find(key(1)) as rounded, full.pipeline.features.find(key(1)) as exact:
            assert isinstance(rounded.features.features, Int8Rows)
            assert rounded.features.features.dense() == pytest.approx(exact.features.features, rel=0.01)
    small, large = sorted(redis_server.client.strlen(name) for name in redis_server.client.keys("*features*"))
    assert small < large


async def test_records_and_claims_end_by_themselves(redis_server):
    async with gateway(redis_server.url, redis_ttl_s=100, redis_flight_s=1.5) as house:
        house.vision.gate.clear()
        asked = asyncio.create_task(ask(house, 1))
        await until(lambda: house.vision.calls)
        assert 0 < redis_server.client.pttl(flight_key(key(1))) <= 1500
        house.vision.gate.set()
        await asked
        await kept(house, 1)
        assert 90 < redis_server.client.ttl(record_key(key(1))) <= 100
        assert not redis_server.client.exists(flight_key(key(1)))


async def test_fifty_requests_for_a_new_image_over_two_gateways_encode_it_once(redis_server):
    async with gateway(redis_server.url) as one, gateway(redis_server.url) as other:
        for house in (one, other):
            house.vision.gate.clear()
        asked = [asyncio.create_task(ask(house, 1)) for house in (one, other) * 25]
        await until(lambda: one.vision.calls or other.vision.calls)
        await turns()
        for house in (one, other):
            house.vision.gate.set()
        assert sorted(await asyncio.gather(*asked)) == ["hit"] * 49 + ["miss"]
        assert (one.vision.calls + other.vision.calls).count("see") == 1
        assert sorted([lookups(one), lookups(other)], key=str) == [{"miss": 1}, {"shared": 1}]
        assert lookups(one, "memory") == lookups(other, "memory") == {"miss": 1, "shared": 24}


async def test_nobody_waits_for_a_claim_of_its_own_gateway(redis_server):
    async with gateway(redis_server.url, redis_flight_s=60) as house:
        house.vision.gate.clear()
        patient = asyncio.create_task(ask(house, 1, priority=Priority.LOW))
        await until(lambda: house.vision.calls)
        other = asyncio.create_task(ask(house, 1))
        await until(lambda: house.vision.calls == ["see", "see"])
        house.vision.gate.set()
        assert await asyncio.gather(patient, other) == ["miss", "miss"]
        await kept(house, 2)
        await until(lambda: not redis_server.client.exists(flight_key(key(1))))


async def test_many_new_images_over_two_gateways_are_encoded_once_each(redis_server):
    async with gateway(redis_server.url) as one, gateway(redis_server.url) as other:
        results = await asyncio.gather(*(ask(house, number % 20) for number in range(100) for house in (one, other)))
        assert results.count("miss") == 20
        assert (one.vision.calls + other.vision.calls).count("see") == 20


async def test_a_claim_whose_holder_stops_passes_to_another_gateway(redis_server):
    async with (
        gateway(redis_server.url, redis_flight_s=60) as one,
        gateway(redis_server.url, redis_flight_s=60) as other,
    ):
        one.vision.gate.clear()
        leader = asyncio.create_task(ask(one, 1))
        await until(lambda: one.vision.calls)
        waiting = asyncio.create_task(timed(other, 1))
        await turns()
        assert not other.vision.calls
        one.admission.end()
        with pytest.raises(ShuttingDown):
            await leader
        result, seconds = await waiting
        assert result == "miss"
        assert seconds < SLACK_S  # for a claim that stays it would wait for half of its 30 s


async def test_a_claim_of_a_gateway_that_died_is_waited_for_no_longer_than_said(redis_server):
    async with gateway(redis_server.url, redis_flight_s=0.3) as house:
        redis_server.client.set(flight_key(key(1)), "dead")
        result, seconds = await timed(house, 1)
        assert result == "miss"
        assert 0.3 <= seconds < 0.3 + SLACK_S
        await until(lambda: writes(house, "kept"))
        assert redis_server.client.get(flight_key(key(1))) == b"dead"  # not ours to give back


async def test_waiting_for_another_gateway_leaves_half_the_time_for_an_encode_of_our_own(redis_server):
    redis_server.client.set(flight_key(key(1)), "slow")
    async with gateway(redis_server.url, redis_flight_s=60) as house:
        begun = time.monotonic()
        assert await ask(house, 1, timeout_s=4.0) == "miss"
        assert 1.9 < time.monotonic() - begun < 4.0


async def test_a_cancelled_lookup_leaves_its_connection_in_order(redis_server):
    async with gateway(redis_server.url) as house:
        await ask(house, 1)
        await kept(house, 1)
        redis_server.pause()
        doomed = [asyncio.create_task(ask(house, 1)) for _ in range(3)]
        await until(lambda: house.counted("glimpse_requests_in_flight") == 3)
        for task in doomed:
            await cancelled(task)
        redis_server.resume()
        assert [await ask(house, 2), await ask(house, 1)] == ["miss", "hit"]


async def test_a_claim_granted_when_the_record_is_there_by_now_is_given_back_at_once(redis_server):
    async with gateway(redis_server.url, redis_flight_s=600) as house:
        await ask(house, 1)
        await kept(house, 1)
        record = redis_server.client.get(record_key(key(1)))
        redis_server.client.delete(record_key(key(1)))
        redis_server.client.set(flight_key(key(1)), "another")
        asked = asyncio.create_task(ask(house, 1))
        await waits(redis_server)
        with redis_server.client.pipeline(transaction=True) as at_once:
            at_once.set(record_key(key(1)), record).delete(flight_key(key(1))).execute()
        assert await asked == "hit"
        assert lookups(house) == {"miss": 1, "shared": 1}
        await until(lambda: not redis_server.client.exists(flight_key(key(1))), STUCK_S)


async def waits(redis_server: RedisServer) -> None:
    """Until somebody has tried several times to get a claim."""
    claims = redis_server.client.info("commandstats")["cmdstat_set"]["calls"]
    await until(lambda: redis_server.client.info("commandstats")["cmdstat_set"]["calls"] > claims + 3, STUCK_S)


async def test_each_look_at_another_gateways_encode_has_redis_whole_time(redis_server):
    """The first lookup took most of its time; that is no reason to think Redis slow."""
    async with gateway(redis_server.url, redis_timeout_s=5.0, redis_flight_s=600) as house:
        redis_server.client.set(flight_key(key(1)), "another")
        given: list[float] = []
        ask = house.shared.ask

        async def slow(lane: Lane, left_s: float, *commands: Command) -> list[Reply]:
            given.append(left_s)
            if len(given) == 1:
                await asyncio.sleep(1.0)
            return await ask(lane, left_s, *commands)

        house.shared.ask = slow
        assert await house.shared.find(key(1), 0.5) is None
        assert given[1] < 4.5
        assert given[2:] == [5.0] * (len(given) - 2) != []


async def test_the_claim_of_a_record_that_is_dropped_is_given_back(redis_server):
    async with gateway(redis_server.url, redis_flight_s=600) as house:
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        assert await house.shared.find(key(1000), 0) is None
        assert redis_server.client.exists(flight_key(key(1000)))
        for number in range(MOST_UNWRITTEN):
            house.shared.put(key(number), vision)
        house.shared.put(key(1000), vision)
        assert writes(house, "dropped") == 1
        await until(lambda: not redis_server.client.exists(flight_key(key(1000))), STUCK_S)
        assert not redis_server.client.exists(record_key(key(1000)))


@pytest.mark.parametrize("end", ["put", "give_up", "dropped"])
async def test_a_claim_that_is_over_is_ours_no_more_and_anothers_is_waited_for(redis_server, end):
    async with gateway(redis_server.url, redis_flight_s=600) as house:
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        assert await house.shared.find(key(1), 0) is None
        match end:
            case "put":
                house.shared.put(key(1), vision)
            case "give_up":
                house.shared.give_up(key(1))
            case "dropped":
                for number in range(1000, 1000 + MOST_UNWRITTEN):
                    house.shared.put(key(number), vision)
                house.shared.put(key(1), vision)
        await until(lambda: not redis_server.client.exists(flight_key(key(1))), STUCK_S)
        redis_server.client.delete(record_key(key(1)))
        redis_server.client.set(flight_key(key(1)), "another")
        asked = asyncio.create_task(house.shared.find(key(1), 60))
        await waits(redis_server)
        redis_server.client.set(record_key(key(1)), pack(key(1), vision))
        assert await asked is not None
        assert redis_server.client.get(flight_key(key(1))) == b"another"


async def test_a_release_does_not_wait_for_the_records_that_are_written(redis_server):
    async with gateway(redis_server.url, redis_flight_s=600) as house:
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        assert await house.shared.find(key(1), 0) is None

        async def hang(*_: Command) -> list[Reply]:
            return await asyncio.Event().wait()

        house.shared._writes.ask = hang
        for number in range(1000, 1000 + MOST_UNWRITTEN):
            house.shared.put(key(number), vision)
        house.shared.give_up(key(1))
        await until(lambda: not redis_server.client.exists(flight_key(key(1))), STUCK_S)
        assert house.shared.unwritten >= MOST_UNWRITTEN - 1


@pytest.mark.parametrize("end", ["fails", "is cancelled while it looks"])
async def test_a_claim_stays_while_another_caller_of_its_gateway_encodes(redis_server, end):
    async with gateway(redis_server.url, redis_flight_s=600) as house:
        shared = house.shared
        assert await shared.find(key(1), 0) is None
        if end == "fails":
            assert await shared.find(key(1), 0) is None
            shared.give_up(key(1))
        else:
            redis_server.pause()
            looking = asyncio.create_task(shared.find(key(1), 0))
            await turns()
            await cancelled(looking)
            redis_server.resume()
        await until(lambda: not shared.unwritten)
        await shared.ask(shared._lookups, None, ("GET", "x"))  # comes after a release
        assert redis_server.client.get(flight_key(key(1))) == shared._me.encode()
        shared.give_up(key(1))
        await until(lambda: not redis_server.client.exists(flight_key(key(1))), STUCK_S)


async def test_a_write_that_has_to_wait_too_long_is_dropped_and_counted(redis_server):
    async with gateway(redis_server.url) as house:
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        for number in range(MOST_UNWRITTEN + 10):
            house.shared.put(key(number), vision)
        assert writes(house, "dropped") == 10
        await kept(house, MOST_UNWRITTEN)


# Faults.


@pytest.mark.usefixtures("patient_lanes")
async def test_absent_at_start_and_there_later(redis_server):
    redis_server.kill()
    with capture_logs() as logs:
        async with gateway(redis_server.url, in_use=False, redis_timeout_s=0.05) as house:
            timings = [await timed(house, number % 10) for number in range(30)]
            assert {result for result, _ in timings} == {"miss"}
            assert max(seconds for _, seconds in timings) < SLACK_S
            assert lookups(house) == {"skipped": 30}
            assert writes(house, "skipped") == 30
            assert house.counted("glimpse_redis_breaker_open") == 1
            await until(lambda: errors(house, "unreachable"))
            redis_server.start()
            await until(lambda: not house.counted("glimpse_redis_breaker_open"), 10)
            await ask(house, 1)
            await kept(house, 1)
            assert await ask(house, 1) == "hit"
    said = [line["event"] for line in logs if line["event"].startswith("redis")]
    assert said[:2] == ["redis_not_in_use", "redis_in_use"]  # once each, not once a trial


async def test_killed_and_started_again_under_load(redis_server):
    """A Redis that is gone refuses connections at once, so no request waits for `redis_timeout_s`.

    That is longer than any answer takes on a busy machine: four at once took 6 s beside four busy processes.
    """
    patience = {"redis_timeout_s": 4 * PATIENT}
    async with gateway(redis_server.url, **patience) as one, gateway(redis_server.url, **patience) as other:
        houses = (one, other)
        timings: list[float] = []
        stopping = asyncio.Event()

        async def load(house: House, start: int) -> None:
            number = start
            while not stopping.is_set():
                timings.append((await timed(house, number % 8))[1])
                number += 1

        async def more(result: str) -> None:
            """Until each gateway has counted 20 more of these lookups."""
            before = [lookups(house).get(result, 0) for house in houses]
            await until(
                lambda: all(lookups(h).get(result, 0) > b + 20 for h, b in zip(houses, before, strict=True)), STUCK_S
            )

        async with asyncio.TaskGroup() as tasks:
            for start in (0, 4):
                tasks.create_task(load(one, start))
                tasks.create_task(load(other, start + 2))
            await more("hit")
            await asyncio.to_thread(redis_server.kill)
            await until(lambda: all(house.counted("glimpse_redis_breaker_open") for house in houses), STUCK_S)
            failed = [lookups(house)["failed"] for house in houses]
            await more("skipped")
            for house, before in zip(houses, failed, strict=True):  # two were under way when the breaker opened
                assert before <= lookups(house)["failed"] <= before + 2
            await asyncio.to_thread(redis_server.start)
            await more("hit")
            stopping.set()
        assert max(timings) < patience["redis_timeout_s"]
        for house in houses:
            assert house.outcomes().keys() == {"ok"}
            assert errors(house, "unreachable") >= 3  # what opens the breaker


@pytest.mark.usefixtures("patient_lanes")
async def test_paused(redis_server):
    async with gateway(redis_server.url, redis_timeout_s=0.05) as house:
        await ask(house, 1)
        await kept(house, 1)
        redis_server.pause()
        timings = await asyncio.gather(*(timed(house, 1) for _ in range(20)), *(timed(house, n) for n in range(2, 20)))
        assert {result for result, _ in timings} <= {"miss", "hit"}
        assert max(seconds for _, seconds in timings) < 0.05 + SLACK_S
        assert errors(house, "timeout") >= 3
        assert house.counted("glimpse_redis_breaker_open") == 1
        slow = lookups(house)["failed"]
        assert [(await timed(house, number))[0] for number in range(20, 70)] == ["miss"] * 50
        assert lookups(house)["failed"] == slow  # nobody waits any more
        redis_server.resume()
        await until(lambda: not house.counted("glimpse_redis_breaker_open"), 10)
        assert await ask(house, 1) == "hit"


@pytest.mark.usefixtures("patient_lanes")
async def test_a_gateway_stops_while_redis_is_paused_and_a_record_half_written(redis_server):
    async with gateway(redis_server.url) as house:
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        redis_server.pause()
        house.shared.put(key(1), replace(vision, features=np.zeros((257, 20_000), np.float32)))  # 20 MB
        await until(lambda: not house.shared.unwritten)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < SLACK_S
    redis_server.resume()


@pytest.mark.usefixtures("patient_lanes")
async def test_paused_while_another_gateway_encodes(redis_server):
    async with gateway(redis_server.url, redis_timeout_s=0.2, redis_flight_s=60) as house:
        redis_server.client.set(flight_key(key(1)), "another")
        asked = asyncio.create_task(timed(house, 1))
        await until(lambda: redis_server.client.info("commandstats")["cmdstat_set"]["calls"] > 3)  # it waits
        redis_server.pause()
        begun = time.monotonic()
        assert (await asked)[0] == "miss"
        assert time.monotonic() - begun < 0.2 + SLACK_S
        redis_server.resume()


async def test_full_and_nothing_may_go(start_redis: StartRedis):
    redis_server = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    async with gateway(redis_server.url) as house:
        await ask(house, 0)
        await kept(house, 1)
        redis_server.client.config_set("maxmemory", "1")
        timings = [await timed(house, number) for number in range(1, 20)]
        assert {result for result, _ in timings} == {"miss"}
        await until(lambda: writes(house, "failed") == 19)
        assert writes(house, "kept") == 1
        assert errors(house, "full") == 19 * 2  # the claims and the records
        assert house.counted("glimpse_redis_breaker_open") == 0
        assert await ask(house, 0) == "hit"  # what is there can still be read
        redis_server.client.config_set("maxmemory", "0")
        await ask(house, 1)
        await kept(house, 2)
        assert await ask(house, 1) == "hit"


async def test_a_redis_that_refuses_writes_is_told_in_one_line_with_its_mend(start_redis: StartRedis):
    redis_server = start_redis("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    with capture_logs() as lines:
        async with gateway(redis_server.url) as house:
            for number in range(10):
                assert await ask(house, number) == "miss"
            await until(lambda: writes(house, "failed") == 10)
    (line,) = [line for line in lines if line["event"] == "redis_refuses_writes"]
    assert (line["log_level"], line["kind"]) == ("warning", "full")
    assert "maxmemory" in line["reason"]
    assert "volatile-lru" in line["mend"]


@pytest.mark.parametrize(
    ("rules", "kind", "mend"),
    [("+@all -set", "denied", "SET"), ("+@all -set -eval", "denied", "EVAL")],
)
async def test_a_user_that_may_not_write_is_told_with_the_commands_to_allow(redis_server, rules, kind, mend):
    redis_server.client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", *rules.split())
    url = redis_server.url.replace("//", "//reader:secret@")
    with capture_logs() as lines:
        async with gateway(url) as house:
            for number in range(3):
                assert await ask(house, number) == "miss"
            await until(lambda: writes(house, "failed") == 3)
    told = [line for line in lines if line["event"] == "redis_refuses_writes"]
    assert [(line["kind"], mend in line["mend"]) for line in told] == [(kind, True)]


async def test_a_user_that_may_not_release_a_claim_is_told_and_lookups_go_on(redis_server):
    redis_server.client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@all", "-unlink")
    url = redis_server.url.replace("//", "//reader:secret@")
    with capture_logs() as lines:
        async with gateway(url) as house:
            assert await ask(house, 1) == "miss"
            await until(lambda: errors(house, "denied") == 1)
            assert writes(house, "kept") == 1
            for number in range(2, 6):
                house.shared.give_up(key(number))
                redis_server.client.set(flight_key(key(number)), house.shared._me)
            await until(lambda: house.shared.unwritten == 0)
            assert await ask(house, 1) == "hit"
            assert house.shared.in_use
    told = [line for line in lines if line["event"] == "redis_refuses_writes"]
    assert [(line["kind"], "UNLINK" in line["mend"]) for line in told] == [("denied", True)]


async def test_a_fault_that_opens_no_breaker_is_told_in_one_line(redis_server):
    """The first of three in a row, and then a lookup that succeeds, over and over."""
    with capture_logs() as lines:
        async with gateway(redis_server.url, redis_timeout_s=0.02) as house:
            for number in range(4):
                redis_server.pause()
                assert await ask(house, number) == "miss"
                redis_server.resume()
                await until(lambda: house.shared.unwritten == 0)
                house.shared.breaker.succeeded(house.shared._lookups)
    assert not [line for line in lines if line["event"] == "redis_not_in_use"]
    (line,) = [line for line in lines if line["event"] == "redis_fault"]
    assert line["kind"] == "timeout"


async def test_only_faults_in_a_row_on_one_connection_stop_the_use_of_redis(redis_server):
    async with gateway(redis_server.url) as house:
        shared, lane = house.shared, house.shared._writes

        async def fail() -> None:
            with pytest.raises(RedisFault, match=r"no answer within 0\.01 s"):
                async with shared.asking(lane, 0.01):
                    await asyncio.Event().wait()

        for _ in range(3):
            await fail()
            await fail()
            await shared.ask(shared._lookups, None, ("GET", "x"))
            assert shared.in_use
            await shared.ask(lane, None, ("GET", "x"))
        for _ in range(3):
            assert shared.in_use
            await fail()
        assert not shared.in_use
        assert errors(house, "timeout") == 9
        with pytest.raises(RedisFault, match="not in use"):
            await shared.ask(lane, None, ("GET", "x"))
        assert errors(house, "timeout") == 9


async def test_commands_that_redis_refuses_do_not_stop_its_use(redis_server):
    async with gateway(redis_server.url) as house:
        for _ in range(5):
            refusal, reply = await house.shared.ask(house.shared._writes, None, ("NONE",), ("GET", "x"))
            assert (refusal.kind, refusal.is_refusal, reply) == ("refused", True, None)
        assert house.shared.in_use
        assert errors(house, "refused") == 5


async def test_a_fault_of_our_own_ends_no_writes(redis_server, monkeypatch):
    async with gateway(redis_server.url) as house:
        monkeypatch.setattr(redis_tier, "INLINE_PACK_BYTES", 0)

        def no_thread(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as broken, capture_logs() as logs:
            broken.setattr(asyncio, "to_thread", no_thread)
            vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
            house.shared.put(key(1), vision)
            await until(lambda: writes(house, "failed") == 1)
        assert [line["event"] for line in logs] == ["watch_failed"]
        house.shared.put(key(2), vision)
        await kept(house, 1)


class OddRedis:
    """Speaks Redis's protocol and is none: each reply is `replies`' for the command, else OK."""

    def __init__(self, replies: dict[bytes, bytes]) -> None:
        self.replies = replies
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                words = []
                for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                self.asked.append(words[0])
                writer.write(self.replies.get(words[0], b"+OK\r\n"))
                await writer.drain()
        writer.close()


@pytest.mark.parametrize("reply", [b":1\r\n", b"*0\r\n", b"*1\r\n:1\r\n", b"+OK\r\n"])
async def test_a_reply_that_no_redis_gives_is_a_miss(reply):
    odd = OddRedis({b"GET": reply, b"INFO": b"$0\r\n\r\n"})
    async with await asyncio.start_server(odd.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with gateway(f"redis://127.0.0.1:{port}/0", redis_flight_s=0.1) as house:
            assert await ask(house, 1) == "miss"
            assert house.counted("glimpse_redis_bad_records_total", reason="magic") >= 1
            await house.shared.measure()  # no figure is known, and nothing ends
            assert b"INFO" in odd.asked


async def test_full_and_the_least_used_goes(start_redis: StartRedis):
    redis_server = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    async with gateway(redis_server.url) as house:
        await house.shared.measure()
        for number in range(200):  # 20 KB each
            assert await ask(house, number) == "miss"
        await kept(house, 200)
        await house.shared.measure()
        assert house.counted("glimpse_feature_cache_evictions_total", tier="redis") > 50
        assert 1e6 < house.counted("glimpse_feature_cache_bytes", tier="redis") < 4e6
        assert await ask(house, 199) == "hit"
        assert errors(house, "full") == 0


async def test_only_evictions_since_the_gateway_began_to_measure_are_counted(start_redis: StartRedis):
    redis_server = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")

    def evict() -> int:
        """How many there were by now, which is more than before."""
        before = redis_server.client.info("stats")["evicted_keys"]
        for number in range(1000):
            redis_server.client.set(f"{before}-{number}", bytes(20_000))
        evicted = redis_server.client.info("stats")["evicted_keys"]
        assert evicted > before
        return evicted

    async with gateway(redis_server.url) as house:

        async def counted() -> float:
            await house.shared.measure()
            return house.counted("glimpse_feature_cache_evictions_total", tier="redis")

        first = evict()
        assert await counted() == 0
        more = pytest.approx(evict() - first, abs=20)  # measuring takes memory too
        assert await counted() == more
        assert await counted() == more
        redis_server.kill()
        assert await counted() == more
        redis_server.start()  # empty, and it counts from zero again

        async def measured_again() -> bool:
            assert await counted() == more
            return house.counted("glimpse_feature_cache_bytes", tier="redis") < 2e6

        await eventually_async(measured_again, STUCK_S, "the new Redis is measured")
        every = pytest.approx(more.expected + evict(), abs=40)
        assert await counted() == every


@pytest.mark.parametrize("reason", ["magic", "version", "checksum", "key", "shape", "dtype"])
async def test_a_record_that_does_not_fit_is_deleted_and_made_anew(redis_server, reason):
    async with gateway(redis_server.url) as house:
        await ask(house, 1)
        await kept(house, 1)
        good = bytearray(redis_server.client.get(record_key(key(1))))
        vision, _ = await house.vision.see(np.zeros((3, 224, 224)), None, Budget(), 1.0)
        house.vision.calls.clear()
        bad = {
            "magic": b"rubbish",
            "version": good[:4] + b"\x02\x00" + good[6:],
            "checksum": good[:-1] + bytes([good[-1] ^ 1]),
            "key": pack(FeatureKey("another model", IMAGE_SIZE, key(1).digest), vision),
            "shape": pack(
                key(1), type(vision)(vision.features[:, :3], vision.saliency, vision.entropy, vision.texture)
            ),
            "dtype": pack(key(1), replace(vision, features=vision.features.astype(np.float16))),
        }[reason]
        redis_server.client.set(record_key(key(1)), bytes(bad))
        assert await ask(house, 1) == "miss"
        assert house.counted("glimpse_redis_bad_records_total", reason=reason) == 1
        await kept(house, 2)
        assert redis_server.client.get(record_key(key(1))) == good
        assert await ask(house, 1) == "hit"
        assert house.vision.calls == ["see", "attend"]


async def test_another_model_has_keys_of_its_own(redis_server):
    async with gateway(redis_server.url) as house:
        await ask(house, 1)
        await kept(house, 1)
        async with house.pipeline.features.find(FeatureKey("another model", IMAGE_SIZE, key(1).digest)) as found:
            assert found.features is None


async def test_a_wrong_password(start_redis: StartRedis):
    redis_server = start_redis("--requirepass", "right")
    url = redis_server.url.replace("redis://", "redis://:wrong@")
    with capture_logs() as logs:
        async with gateway(url, in_use=False) as house:
            timings = [await timed(house, number) for number in range(5)]
            assert {result for result, _ in timings} == {"miss"}
            await until(lambda: errors(house, "denied") >= 2)
            assert house.counted("glimpse_redis_breaker_open") == 1
    (said,) = [line for line in logs if line["event"] == "redis_not_in_use"]
    assert said["kind"] == "denied"
    assert "wrong@" not in str(logs)
    async with gateway(redis_server.url.replace("redis://", "redis://:right@")) as house:
        await ask(house, 1)
        await kept(house, 1)


async def test_a_password_that_is_changed_under_way(redis_server):
    async with gateway(redis_server.url) as house:
        await ask(house, 1)
        redis_server.client.config_set("requirepass", "new")
        redis_server.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert {await ask(house, number) for number in range(2, 12)} == {"miss"}
        await until(lambda: errors(house, "denied"))
        assert house.counted("glimpse_redis_breaker_open") == 1


# The closer view, which has a record of its own.


def closer_key(number: int) -> FeatureKey:
    return FeatureKey(CARD.fingerprint, CLOSER_SIZE, Image.of(image(number)).digest)


async def test_both_views_of_an_image_are_encoded_once_for_two_gateways(redis_server):
    async with gateway(redis_server.url, CLOSER) as one, gateway(redis_server.url, CLOSER) as other:
        for house in (one, other):
            house.vision.gate.clear()
        asked = [asyncio.create_task(ask(house, 1, detail="high")) for house in (one, other) * 10]
        await until(lambda: one.vision.calls or other.vision.calls)
        await turns()
        for house in (one, other):
            house.vision.gate.set()
        assert sorted(await asyncio.gather(*asked)) == ["hit"] * 19 + ["miss"]
        calls = one.vision.calls + other.vision.calls
        assert [calls.count("encode 1"), calls.count("encode 4"), calls.count("attend_448")] == [1, 1, 20]
        await until(lambda: writes(one, "kept") + writes(other, "kept") == 2)
        assert redis_server.client.exists(record_key(key(1)), record_key(closer_key(1))) == 2


@pytest.mark.parametrize("reason", ["checksum", "shape"])
async def test_a_closer_view_that_does_not_fit_is_deleted_and_encoded_anew(redis_server, reason):
    async with gateway(redis_server.url, CLOSER) as house:
        await ask(house, 1, detail="high")
        await kept(house, 2)
        good = redis_server.client.get(record_key(closer_key(1)))
        small = pack(closer_key(1), CloserFeatures(np.zeros((1024, 3), np.float32)))
        bad = {"checksum": good[:-1] + bytes([good[-1] ^ 1]), "shape": small}[reason]
        redis_server.client.set(record_key(closer_key(1)), bad)
        house.vision.calls.clear()
        assert await ask(house, 1, detail="high") == "miss"
        assert house.counted("glimpse_redis_bad_records_total", reason=reason) == 1
        await kept(house, 3)
        assert redis_server.client.get(record_key(closer_key(1))) == good
        assert house.vision.calls == ["encode 4", "attend_448"]


async def test_closer_views_go_on_without_redis(redis_server):
    async with gateway(redis_server.url, CLOSER, redis_timeout_s=0.05) as house:
        assert await ask(house, 1, detail="high") == "miss"
        await kept(house, 2)
        redis_server.pause()
        assert {await ask(house, number, detail="high") for number in range(2, 8)} == {"miss"}
        redis_server.resume()
        assert house.outcomes() == {"ok": 7}
        await until(lambda: not house.counted("glimpse_redis_breaker_open"), 10)
        assert await ask(house, 1, detail="high") == "hit"


# A cluster.


class Cluster:
    """Three nodes, which share the slots."""

    def __init__(self, start_redis: StartRedis) -> None:
        self.nodes = []
        for number, bus in enumerate(free_ports(3)):
            files = ("--cluster-config-file", f"node-{number}.conf")
            node = start_redis("--cluster-enabled", "yes", "--cluster-port", str(bus), *files)
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * 5461, number * 5461 + 5460 + number // 2)
            if number:
                first = self.nodes[0].port, int(self._bus)
                node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", *first)
            else:
                self._bus = bus
            self.nodes.append(node)
        eventually(self.is_whole, 20, "a cluster of three")
        self.url = self.nodes[0].url.replace("redis://", "redis+cluster://")

    def is_whole(self) -> bool:
        told = [node.client.execute_command("CLUSTER INFO") for node in self.nodes]
        return all((each["cluster_state"], each["cluster_known_nodes"]) == ("ok", "3") for each in told)

    def owner(self, name: str) -> RedisServer:
        slot = key_slot(name.encode())
        return self.nodes[min(slot // 5461, 2)]

    def move(self, name: str, to: RedisServer) -> None:
        """Its slot, with what is in it."""
        owner, slot = self.owner(name), key_slot(name.encode())
        names = {node.port: node.client.execute_command("CLUSTER MYID").decode() for node in (owner, to)}
        to.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[owner.port])
        owner.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[to.port])
        owner.client.execute_command("MIGRATE", "127.0.0.1", to.port, name, 0, 5000)
        for node in (to, owner):
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", names[to.port])


def test_the_keys_of_an_image_share_a_slot():
    every = [{key_slot(name(each(n)).encode()) for name in (record_key, flight_key)}
             for n in range(20) for each in (key, closer_key)]  # fmt: skip
    assert {len(slots) for slots in every} == {1}
    assert len(set.union(*every)) > 20


async def test_gateways_share_a_cluster_of_three_nodes(start_redis: StartRedis):
    cluster = Cluster(start_redis)
    async with gateway(cluster.url) as one, gateway(cluster.url) as other:
        assert await asyncio.gather(*(ask(one, number) for number in range(20))) == ["miss"] * 20
        await kept(one, 20)
        assert await asyncio.gather(*(ask(other, number) for number in range(20))) == ["hit"] * 20
        assert lookups(one) == {"miss": 20}
        assert all(node.client.dbsize() > 0 for node in cluster.nodes)
    found = await cache_admin.stats(cluster.url)
    assert found.kept[CARD.fingerprint].records == 20
    assert await cache_admin.purge(cluster.url, None) == 20
    assert not any(node.client.dbsize() for node in cluster.nodes)


async def test_a_slot_that_moved_is_followed(start_redis: StartRedis):
    cluster = Cluster(start_redis)
    async with gateway(cluster.url) as house:
        await ask(house, 1)
        await kept(house, 1)
        name = record_key(key(1))
        to = next(node for node in cluster.nodes if node is not cluster.owner(name))
        cluster.move(name, to)
        assert [await ask(house, 1), await ask(house, 1)] == ["hit", "hit"]
        assert house.vision.calls.count("see") == 1


@pytest.mark.usefixtures("patient_lanes")
async def test_without_one_node_of_a_cluster_every_request_is_answered(start_redis: StartRedis):
    cluster = Cluster(start_redis)
    for node in cluster.nodes:
        node.client.config_set("cluster-require-full-coverage", "no")
    async with gateway(cluster.url, redis_timeout_s=0.2) as house:
        for number in range(12):
            await ask(house, number)
        await kept(house, 12)
        lost = cluster.nodes[2]
        lost.kill()
        for number in range(12):
            result, seconds = await timed(house, number)
            assert seconds < 0.2 + SLACK_S
            assert result == "miss" if cluster.owner(record_key(key(number))) is lost else result in ("hit", "miss")
        assert house.outcomes() == {"ok": 24}
        assert errors(house, "unreachable") > 0
