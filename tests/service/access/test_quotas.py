"""What a tenant may use: in this process, over two gateways with one Redis, and while Redis is gone."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from service.access import quotas, windows
from service.access.keys import Keyring, Limits
from service.access.quotas import Bucket, LimitedAccount, Quotas, in_words
from service.access.windows import (
    FORGOTTEN_S,
    GATEWAYS,
    LEASE_S,
    Hit,
    Later,
    SharedWindows,
    Windows,
    give_back,
    hit,
    left_of,
    wait_s,
)
from service.cache.redis_client import close_counters, counters
from service.core.access import UNLIMITED, Use
from service.core.errors import QuotaExceeded
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.telemetry.metrics import Metrics
from tests.service.edges.http.test_vqa import ASKED, Caller, events, fault
from tests.support.calls import failure, question, served
from tests.support.fakes import House, cancelled, png, turns, until
from tests.support.keys import Keys, bearer
from tests.support.samples import sample
from tests.support.servers import RedisServer, eventually_async

RESET_S = 90.0  # of the windows in memory: see `stopped`


def stopped() -> float:
    """Tell the middle of a minute, always.

    The windows in memory begin with the clock's minutes. When one ends, its part is rounded down, and one request more
    than the quota may pass.
    """
    return 1830.0


def from_a_minutes_beginning() -> Callable[[], float]:
    """Return a clock for tests that need one that goes on."""
    begun = time.monotonic()
    return lambda: 1800.0 + time.monotonic() - begun


@asynccontextmanager
async def calling(**settings: object) -> AsyncIterator[Caller]:
    """A service without Triton, with what runs behind its quotas."""
    caller = Caller(House(**settings))
    house = caller.house
    house.quotas.windows._clock = stopped if house.shared is None else from_a_minutes_beginning()
    running = [asyncio.create_task(house.quotas.run())]
    if house.shared is not None:
        running.append(asyncio.create_task(house.shared.run()))
        await until(lambda: house.shared.in_use)
    try:
        yield caller
    finally:
        for task in running:
            await cancelled(task)
        await caller.close()


async def statuses(*asked: Caller, times: int, **body: object) -> Counter[int]:
    """Ask so often, of one service after the other, a few at once."""
    responses: list[httpx.Response] = []
    for start in range(0, times, 8):
        some = (asked[number % len(asked)].ask(**body) for number in range(start, min(start + 8, times)))
        responses += await asyncio.gather(*some)
    return Counter(response.status_code for response in responses)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-0.5, "0ms"),
        (0, "0ms"),
        (0.1204, "121ms"),
        (0.9999, "1000ms"),
        (1, "1s"),
        (1.5, "2s"),
        (59.2, "1m0s"),
        (360, "6m0s"),
        (61, "1m1s"),
    ],
)
def test_times_are_written_as_openais_headers_do(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("room", "before", "before_ends_s", "current", "current_ends_s", "wait"),
    [
        (5, 0, 0.0, 0, 0.0, 0.0),
        (5, 0, 0.0, 5, 90.0, 0.0),
        (5, 10, 30.0, 0, 0.0, 0.0),  # 10 * 30 / 60 = 5
        (5, 10, 60.0, 0, 0.0, 30.0),
        (5, 60, 30.0, 5, 90.0, 30.0),
        (0, 0, 0.0, 5, 70.0, 70.0),
        (5, 0, 0.0, 10, 90.0, 60.0),  # 30 s until it is the earlier window, which has left by half after 30 s more
        (0, 1, 60.0, 0, 0.0, 60.0),
        (0, 0, 0.0, 5, 0.5, 0.5),
        (-1, 0, 0.0, 0, 0.0, math.inf),
    ],
)
def test_the_wait_is_until_the_cost_fits(room, before, before_ends_s, current, current_ends_s, wait):
    assert wait_s(room, before, before_ends_s, current, current_ends_s) == pytest.approx(wait)


def test_what_is_left_counts_the_earlier_window_by_its_part():
    left = left_of(10, 1, before=6, before_ends_s=20.0, current=3, current_ends_s=80.0)
    assert (left.remaining, left.reset_s) == (5, 80.0)


@pytest.mark.parametrize(("before", "current", "reset_s"), [(6, 3, 80.0), (0, 1, 80.0), (1, 0, 20.0), (0, 0, 0.0)])
def test_all_of_a_limit_is_there_again_when_the_last_window_that_counts_has_ended(before, current, reset_s):
    assert left_of(10, 1, before, 20.0, current, 80.0).reset_s == reset_s


def test_without_limits_nothing_is_counted():
    house = House()
    assert house.quotas.of("acme", "") is UNLIMITED
    house.reader.close()


async def test_requests_over_the_quota_are_refused_with_openais_headers():
    async with calling(quota_requests_per_minute=3) as caller:
        for left in (2, 1, 0):
            response = await caller.ask()
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
            assert response.headers["x-ratelimit-reset-requests"] == in_words(RESET_S) == "1m30s"
        refused = await caller.ask()
        error = fault(refused, 429)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert "your tenant may use 3 requests a minute here, and has 0 left" in error["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        other = await caller.http.post("/v1/vqa", json=ASKED, headers={"x-tenant-id": "other"})
        assert other.status_code == 200
        assert caller.house.counted("glimpse_quota_refusals_total", unit="requests") == 1
        assert (await caller.http.get("/v1/models")).status_code == 200


async def test_a_request_over_the_quota_is_refused_before_its_body_is_read():
    async with calling(quota_requests_per_minute=1) as caller:
        await caller.ask()
        read: list[bytes] = []

        async def body() -> AsyncIterator[bytes]:
            read.append(b"x")
            yield b"x"

        fault(await caller.http.post("/v1/images", content=body()), 429)
        assert read == []


async def test_tokens_are_reserved_and_settled_with_what_was_used():
    async with calling(quota_generated_tokens_per_minute=100, quota_visual_tokens_per_minute=64) as caller:
        caller.house.language.say(" red ring")
        response = await caller.ask(max_tokens=60)
        used = response.json()["usage"]["completion_tokens"]
        assert 0 < used < 60
        assert response.headers["x-ratelimit-remaining-tokens"] == "40"  # while it was asked
        assert response.headers["x-ratelimit-remaining-visual-tokens"] == "32"
        await caller.house.quotas.settle()
        again = await caller.ask(max_tokens=60)
        assert again.headers["x-ratelimit-remaining-tokens"] == str(100 - used - 60)
        refused = await caller.ask(max_tokens=1)
        assert "this request may need 32: lower budget.visual_tokens" in fault(refused, 429)["message"]


async def test_a_request_that_never_fits_says_what_to_lower():
    async with calling(quota_generated_tokens_per_minute=10) as caller:
        refused = fault(await caller.ask(max_tokens=60), 429)
        assert "this request may need 60: lower max_tokens" in refused["message"]
        assert (await caller.ask(max_tokens=10)).status_code == 200


async def test_a_question_that_fails_gives_its_images_and_tokens_back():
    async with calling(quota_images_per_minute=2, quota_visual_tokens_per_minute=64) as caller:
        for _ in range(5):
            fault(await caller.ask(image="img_0"), 404)
            await caller.house.quotas.settle()
        assert (await caller.ask()).status_code == 200
        assert (await caller.http.post("/v1/images", content=png())).status_code == 200
        await caller.house.quotas.settle()  # what was used does not come back
        fault(await caller.http.post("/v1/images", content=png()), 429)


async def test_a_caller_that_leaves_while_it_is_charged_is_charged_nothing():
    """Its tenant was charged, and its key's bucket was being asked about."""
    windows = Windows()
    quotas = Quotas(Limits(), lambda: Keyring({}), windows, Metrics())
    buckets = [Bucket(name, name, Limits(generated_tokens_per_minute=100)) for name in ("tenant/a", "key/b")]
    account, asked, hit = LimitedAccount(quotas, buckets), asyncio.Event(), windows.hit
    answered = asyncio.Event()

    async def stuck(bucket: str, unit: str, limit: int, cost: int) -> Hit:
        found = await hit(bucket, unit, limit, cost)
        if bucket == "key/b":  # Redis has charged, and its answer is on the way
            asked.set()
            await answered.wait()
        return found

    windows.hit = stuck  # type: ignore[method-assign]

    async def charge() -> None:
        async with account.charged(Use(generated_tokens=64)):
            raise AssertionError("charged")

    charging = asyncio.create_task(charge())
    await asked.wait()
    assert (await hit("tenant/a", "generated_tokens", 100, 0)).left.remaining == 36
    await cancelled(charging)
    answered.set()
    await until(lambda: not quotas.unasked)
    await quotas.settle()
    for bucket in ("tenant/a", "key/b"):
        assert (await hit(bucket, "generated_tokens", 100, 0)).left.remaining == 100


async def test_a_charge_that_failed_or_was_refused_is_not_given_back():
    quotas, given_back = Quotas(Limits(), Keyring, Windows(), Metrics()), list[int]()

    async def back(amount: int) -> None:
        given_back.append(amount)

    left = left_of(10, 1, 0, 0.0, 0, 0.0)
    cancelled_one, failed, refused, made = (asyncio.get_running_loop().create_future() for _ in range(4))
    cancelled_one.cancel()
    failed.set_exception(RuntimeError("a fault of our own"))
    refused.set_result(Hit(False, left, back))
    made.set_result(Hit(True, left, back))
    for each in (cancelled_one, failed, refused, made):
        quotas.unasked.add(each)
        quotas.refund(7, each)
    await quotas.settle()
    assert given_back == [7]
    assert not quotas.unasked


def account(windows: Windows, metrics: Metrics, **limits: int) -> LimitedAccount:
    quotas = Quotas(Limits(), Keyring, windows, metrics)
    return LimitedAccount(quotas, [Bucket("tenant/a", "your tenant", Limits(**limits))])


async def charge(one: LimitedAccount, use: Use) -> None:
    """Enter, and use all of it."""
    await one.enter()
    async with one.charged(use) as used:
        for name in Use.__slots__:
            setattr(used, name, getattr(use, name))


@pytest.mark.parametrize(
    ("limits", "used", "unit", "retry_s", "says"),
    [
        (
            {"requests_per_minute": 1},
            Use(),
            "requests",
            60.0,
            "your tenant may use 1 requests a minute here, and has 0 left",
        ),
        (
            {"images_per_minute": 1000},
            Use(images=1001),
            "images",
            60.0,
            "your tenant may use 1,000 images a minute here, and has 1,000 left; this request may need 1,001: send "
            "fewer images, or lower video_frames, or try again later",
        ),
        (
            {"visual_tokens_per_minute": 100},
            Use(visual_tokens=60),
            "visual_tokens",
            50.0,  # 30 s until the minute is over, and 20 s more until a third of it has left
            "your tenant may use 100 visual tokens a minute here, and has 40 left; this request may need 60: lower "
            "budget.visual_tokens or video_frames, or send fewer images, or try again later",
        ),
        (
            {"generated_tokens_per_minute": 10},
            Use(generated_tokens=11),
            "generated_tokens",
            60.0,
            "your tenant may use 10 generated tokens a minute here, and has 10 left; this request may need 11: lower "
            "max_tokens, or try again later",
        ),
        ({"concurrent_requests": 1}, Use(), "concurrent_requests", 1.0, "your tenant has 1 open requests"),
    ],
)
async def test_a_refusal_says_what_is_used_up_what_to_lower_and_when_to_come_again(limits, used, unit, retry_s, says):
    windows, metrics = Windows(clock=stopped), Metrics()

    async def charge_twice() -> None:
        for _ in range(2):
            await charge(account(windows, metrics, **limits), used)

    with pytest.raises(QuotaExceeded) as caught:
        await charge_twice()
    assert caught.value.message == f"the quota is used up: {says}; try again in {retry_s:.0f} s"
    assert caught.value.retry_after_s == pytest.approx(retry_s)
    assert sample(metrics, "glimpse_quota_refusals_total", {"unit": unit}) == 1


async def test_what_is_left_to_do_for_a_place_is_done_once_in_the_background():
    done: list[str] = []

    class Telling(Windows):
        def leave(self, bucket: str) -> Later:
            super().leave(bucket)

            async def tell() -> None:
                done.append(bucket)

            return tell

    for counting, told in ((Telling(), ["tenant/a"]), (Windows(), [])):
        done.clear()
        one = account(counting, Metrics(), concurrent_requests=1)
        await one.enter()
        for _ in range(2):
            one.leave()
        assert done == []
        await one._quotas.settle()
        assert done == told


async def test_a_key_has_places_of_its_own_though_its_tenant_has_no_limit_of_them():
    quotas = Quotas(Limits(), Keyring, Windows(clock=stopped), Metrics())
    buckets = [Bucket("tenant/a", "your tenant", Limits(images_per_minute=9))]
    buckets.append(Bucket("key/b", "your API key", Limits(concurrent_requests=1)))
    await LimitedAccount(quotas, buckets).enter()
    with pytest.raises(QuotaExceeded, match="your API key has 1 open requests"):
        await LimitedAccount(quotas, buckets).enter()
    await LimitedAccount(quotas, buckets).enter(place=False)


async def test_keys_with_limits_do_not_share_them(tmp_path: Path):
    keys = Keys(tmp_path)
    two = [keys.make("acme", limits=Limits(requests_per_minute=1)) for _ in range(2)]
    async with calling(keys=str(keys.path)) as caller:
        asked = [await caller.http.post("/v1/vqa", json=ASKED, headers=bearer(key)) for key in two * 2]
        assert [response.status_code for response in asked] == [200, 200, 429, 429]


async def test_the_headers_tell_of_each_limit_what_is_left_and_until_when():
    one = account(Windows(clock=stopped), Metrics(), requests_per_minute=3, visual_tokens_per_minute=1000)
    await charge(one, Use(images=1, visual_tokens=64, generated_tokens=5))
    assert one.headers() == [
        ("x-ratelimit-limit-requests", "3"),
        ("x-ratelimit-remaining-requests", "2"),
        ("x-ratelimit-reset-requests", "1m30s"),
        ("x-ratelimit-limit-visual-tokens", "1000"),
        ("x-ratelimit-remaining-visual-tokens", "936"),
        ("x-ratelimit-reset-visual-tokens", "1m30s"),
    ]


async def test_a_stream_has_the_headers_and_settles_at_its_end():
    async with calling(quota_generated_tokens_per_minute=100) as caller:
        response = await caller.ask(stream=True, max_tokens=50)
        assert events(response)[-1] == "[DONE]"
        assert response.headers["x-ratelimit-remaining-tokens"] == "50"
        await caller.house.quotas.settle()
        assert (await caller.ask(max_tokens=99)).status_code == 200


async def test_open_requests_are_limited_and_places_come_back():
    async with calling(quota_concurrent_requests=2) as caller:
        caller.house.language.gate.clear()
        asked = [asyncio.create_task(caller.ask()) for _ in range(2)]
        await until(lambda: caller.house.language.open == 2)
        error = fault(await caller.ask(), 429)
        assert "your tenant has 2 open requests" in error["message"]
        await cancelled(asked.pop())
        await turns()
        caller.house.language.gate.set()
        assert (await asked.pop()).status_code == 200
        await caller.house.quotas.settle()
        assert [(await caller.ask()).status_code for _ in range(6)] == [200] * 6


async def test_a_tenant_and_a_key_have_limits_of_their_own(tmp_path: Path):
    keys = Keys(tmp_path)
    wide, narrow = keys.make("acme"), keys.make("acme", limits=Limits(requests_per_minute=1))
    other = keys.make("other")
    keys.limit("acme", Limits(requests_per_minute=3))
    async with calling(keys=str(keys.path), quota_requests_per_minute=1) as caller:

        async def ask(key: str) -> httpx.Response:
            return await caller.http.post("/v1/vqa", json=ASKED, headers=bearer(key))

        assert (await ask(narrow)).status_code == 200
        assert "your API key may use 1 requests" in fault(await ask(narrow), 429)["message"]
        await caller.house.quotas.settle()  # the tenant's part of the refused request comes back
        assert [(await ask(wide)).status_code for _ in range(3)] == [200, 200, 429]
        assert [(await ask(other)).status_code for _ in range(2)] == [200, 429]


async def test_who_ends_leaves_its_places_of_the_tenant_and_of_the_key_and_so_does_who_gets_only_one(tmp_path: Path):
    keys = Keys(tmp_path)
    narrow, wide = keys.make("acme", limits=Limits(concurrent_requests=1)), keys.make("acme")
    async with calling(keys=str(keys.path), quota_concurrent_requests=2) as caller:

        async def ask(key: str) -> httpx.Response:
            return await caller.http.post("/v1/vqa", json=ASKED, headers=bearer(key))

        caller.house.language.gate.clear()
        asked = [asyncio.create_task(ask(narrow))]
        await until(lambda: caller.house.language.open == 1)
        assert "your API key has 1 open requests" in fault(await ask(narrow), 429)["message"]
        asked.append(asyncio.create_task(ask(wide)))  # in the place that the refused one had of the tenant's
        await until(lambda: caller.house.language.open == 2)
        assert "your tenant has 2 open requests" in fault(await ask(narrow), 429)["message"]
        caller.house.language.gate.set()
        assert [(await each).status_code for each in asked] == [200, 200]
        assert [(await ask(narrow)).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(("tenants", "keys_own"), [(3, 10), (10, 3)])
async def test_the_headers_tell_of_the_limit_that_has_least_left(tmp_path: Path, tenants, keys_own):
    keys = Keys(tmp_path)
    key = keys.make("acme", limits=Limits(requests_per_minute=keys_own))
    async with calling(keys=str(keys.path), quota_requests_per_minute=tenants) as caller:
        told = (await caller.http.post("/v1/vqa", json=ASKED, headers=bearer(key))).headers
        assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("3", "2")


async def test_a_settlement_that_fails_does_not_end_those_behind_it():
    async with calling() as caller:
        settled = asyncio.Event()

        async def failing() -> None:
            raise RuntimeError("a fault of our own")

        async def settling() -> None:
            settled.set()

        with capture_logs() as logs:
            caller.house.quotas.later(failing)
            caller.house.quotas.later(settling)
            async with asyncio.timeout(20):
                await settled.wait()
        assert [line["watch"] for line in logs if line["event"] == "watch_failed"] == ["quotas"]


async def test_a_heartbeat_that_fails_is_not_the_last(redis_server, monkeypatch):
    monkeypatch.setattr(windows, "HEARTBEAT_S", 0.01)
    async with calling(redis_url=redis_server.url) as caller:
        shared, beats = shared_windows(caller, redis_server), list[int]()

        async def failing() -> None:
            beats.append(1)
            raise TypeError("no Redis replies so")

        monkeypatch.setattr(shared, "beat", failing)
        with capture_logs() as logs:
            running = asyncio.create_task(shared.run())
            await shared.hit("tenant/acme", "requests", 5, 1)
            await until(lambda: len(beats) > 2)
            await cancelled(running)
        assert [line["watch"] for line in logs if line["event"] == "watch_failed"] == ["quotas of all gateways"]


async def test_settlements_that_nobody_does_are_lost_at_some_number_and_counted(monkeypatch):
    monkeypatch.setattr(quotas, "MOST_BEHIND", 2)
    house, done = House(quota_requests_per_minute=1), []

    async def work() -> None:
        done.append(1)

    for _ in range(5):
        house.quotas.later(work)
    assert house.counted("glimpse_quota_settlements_lost_total") == 3
    await house.quotas.settle()
    assert len(done) == 2
    house.reader.close()


async def test_a_gateway_that_was_told_of_others_gives_its_part_of_the_places():
    windows = Windows(gateways=2)
    assert [await windows.take("tenant/acme", 3) for _ in range(3)] == [True, True, False]
    assert await windows.take("tenant/other", 3)
    windows.leave("tenant/acme")
    assert [await windows.take("tenant/acme", 3) for _ in range(2)] == [True, False]
    for bucket in ("tenant/acme", "tenant/acme", "tenant/other"):
        windows.leave(bucket)
    assert not windows._open  # tenants that have left take no memory


async def test_without_redis_a_gateway_allows_its_part_of_the_gateways_that_it_was_told():
    async with calling(quota_requests_per_minute=5, quota_gateways=2) as caller:
        assert await statuses(caller, times=5) == {200: 3, 429: 2}


async def test_calls_of_grpc_are_counted_too():
    async with served(House(quota_requests_per_minute=1)) as service:
        assert (await service.stub.Answer(question())).answer == "red"
        failed = await failure(service.stub.Answer(pb.AnswerRequest()))
        assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "rate_limit_exceeded")
        assert failed.retry_after_s >= 1


async def test_two_gateways_share_one_quota_through_redis_and_their_parts_without_it(redis_server):
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 5.0}
    quota = {"quota_requests_per_minute": 40, "quota_concurrent_requests": 30}
    async with calling(**settings, **quota) as one, calling(**settings, **quota) as two:
        assert await statuses(one, two, times=60) == {200: 40, 429: 20}
        for each in (one, two):
            await each.house.quotas.windows.beat()
        await one.house.quotas.windows.beat()
        assert [each.house.counted("glimpse_quota_gateways") for each in (one, two)] == [2, 2]
        assert one.house.counted("glimpse_quota_is_local") == 0
        redis_server.kill()
        left = await statuses(one, times=30) + await statuses(two, times=30)  # each has charged about its 20 of 40
        assert left[200] <= 4
        for each in (one, two):
            each.http.headers["x-tenant-id"] = "other"
        assert await statuses(one, times=30) == {200: 20, 429: 10}
        assert await statuses(two, times=30) == {200: 20, 429: 10}
        assert one.house.counted("glimpse_quota_is_local") == 1
        redis_server.start()
        await until(lambda: one.house.shared.in_use)
        assert (await one.ask()).status_code == 200
        assert one.house.counted("glimpse_quota_is_local") == 0


async def test_what_a_gateway_charged_in_redis_counts_in_its_part_when_redis_is_gone(redis_server):
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 5.0, "quota_gateways": 2}
    quota = {"quota_requests_per_minute": 40, "quota_generated_tokens_per_minute": 2_000}
    async with calling(**settings, **quota) as one, calling(**settings, **quota) as two:
        assert await statuses(one, two, times=20, max_tokens=40) == {200: 20}
        for each in (one, two):
            await each.house.quotas.settle()  # tokens that were not used come back here too
        redis_server.kill()
        found = [await statuses(each, times=15, max_tokens=40) for each in (one, two)]
        assert found == [{200: 10, 429: 5}] * 2  # 40 in all, as with Redis


def test_what_is_given_back_is_no_credit_in_the_next_minute():
    """A request that reserves much, ends in the next minute and used little."""
    now = [59.0]
    windows = Windows(clock=lambda: now[0])

    def hit(cost: int) -> Hit:
        return asyncio.run(windows.hit("tenant/acme", "generated_tokens", 100, cost))

    reserved = hit(100)
    assert not hit(1).fits
    now[0] = 61.0
    asyncio.run(reserved.back(99))
    now[0] = 119.0
    found = hit(100)
    assert (found.fits, found.left.remaining) == (True, 0)
    assert not hit(1).fits
    now[0] = 200.0  # two windows later there is nothing to give back to
    asyncio.run(found.back(100))
    assert hit(100).fits
    assert not hit(1).fits


def test_a_minute_that_ended_a_minute_ago_counts_no_more():
    now = [59.0]
    windows = Windows(clock=lambda: now[0])

    def fits(cost: int) -> bool:
        return asyncio.run(windows.hit("tenant/acme", "requests", 10, cost)).fits

    assert fits(10)
    now[0] = 119.0
    assert fits(9)  # the first minute counts by a sixtieth
    now[0] = 240.0  # nobody asked for a whole minute
    assert fits(10)
    assert not fits(1)


def test_a_clock_that_goes_back_gives_no_quota_again():
    now = [3600.0]
    windows = Windows(clock=lambda: now[0])

    def fits(cost: int) -> bool:
        return asyncio.run(windows.hit("tenant/acme", "requests", 10, cost)).fits

    assert fits(10)
    for now[0] in (3599.0, 3500.0, 0.0, 3600.0, 3600.5):
        assert not fits(1), now
    now[0] = 3660.0 + 30
    assert fits(5)
    now[0] = 3650.0  # the earlier minute still counts by half, and not by more or less than it did
    assert not fits(1)


async def test_what_was_charged_before_a_flush_of_redis_is_no_credit_after_it(redis_server):
    """A new window may end when the one before the flush would have."""
    storage, name = counters(redis_server.url), ("tenant/acme", "generated_tokens")
    for cost, remaining in ((0, 100), (30, 100)):
        charged = await hit(storage, name, 100, 100)
        assert charged.fits
        redis_server.client.flushall()
        if cost:
            assert (await hit(storage, name, 100, cost)).fits
        await charged.back(100)
        found = await hit(storage, name, 100, 0)
        assert found.left.remaining == remaining
        redis_server.client.flushall()
    await close_counters(storage)


async def test_what_is_given_back_comes_back_in_redis_and_here_and_a_refusal_costs_nothing(redis_server):
    async with calling(redis_url=redis_server.url) as caller:
        now = [1.0]
        windows = shared_windows(caller, redis_server, clock=lambda: now[0])

        async def hit(limit: int, cost: int) -> Hit:
            return await windows.hit("tenant/acme", "generated_tokens", limit, cost)

        charged = await hit(100, 60)
        await charged.back(50)
        found = await hit(100, 90)
        assert (found.fits, found.left.remaining) == (True, 0)
        assert not (await hit(100, 1)).fits
        redis_server.kill()
        found = await hit(110, 10)
        assert (found.fits, found.left.remaining) == (True, 0)
        assert caller.house.counted("glimpse_quota_is_local") == 1
        now[0] = 500.0  # minutes later
        assert (await hit(110, 110)).fits


@pytest.mark.parametrize(("told", "gateways", "share"), [(None, 1, 10), (3, 3, 4)])
async def test_a_gateway_counts_those_that_it_was_told_of_from_the_beginning(redis_server, told, gateways, share):
    async with calling(redis_url=redis_server.url) as caller:
        windows = shared_windows(caller, redis_server, gateways=told)
        running = asyncio.create_task(windows.run())
        for _ in range(2):  # before a heartbeat and after it
            assert windows.share(10) == share
            assert caller.house.counted("glimpse_quota_gateways") == gateways
            await windows.beat()
        await cancelled(running)


async def test_redis_takes_what_is_given_back_off_the_window_in_which_it_was_charged(redis_server):
    storage, name = counters(redis_server.url), ("tenant/acme", "generated_tokens")
    charged = await hit(storage, name, 100, 100)
    assert charged.fits
    (key,) = redis_server.client.keys("*")
    counter = key.decode().removeprefix("glimpse:quota:").strip("{}")
    assert counter == "quota/tenant/acme/generated_tokens/100/1/minute"  # gateways of other releases count there too

    async def counts() -> tuple[int, int]:
        before, _, current, _ = await storage.get_sliding_window(counter, 60)
        return before, current

    await charged.back(30)
    assert await counts() == (0, 70)
    redis_server.client.pexpire(key, 59_000)  # its minute is over, and it counts for 59 s more
    assert await counts() == (70, 0)
    await give_back(storage, counter, 60, 59.0)
    assert await counts() == (10, 0)
    for left_s in (-1.0, 0.0, 200.0):  # of a window that is gone, or of none
        await give_back(storage, counter, 10, left_s)
    assert await counts() == (10, 0)
    await close_counters(storage)


async def test_places_are_counted_over_gateways_and_survive_a_redis_that_is_gone(redis_server):
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 5.0, "quota_concurrent_requests": 2}
    async with calling(**settings) as one, calling(**settings, quota_gateways=2) as two:
        for caller in (one, two):
            caller.house.language.gate.clear()
        asked = [asyncio.create_task(caller.ask()) for caller in (one, two)]
        await until(lambda: one.house.language.open == two.house.language.open == 1)
        for caller in (one, two):
            fault(await caller.ask(), 429)
        redis_server.kill()
        fault(await two.ask(), 429)  # its part is one
        for caller in (one, two):
            caller.house.language.gate.set()
        assert [(await each).status_code for each in asked] == [200, 200]
        for caller in (one, two):
            await caller.house.quotas.settle()
        redis_server.start()
        for caller in (one, two):
            await until(lambda caller=caller: caller.house.shared.in_use)
        assert (await one.ask()).status_code == 200


def shared_windows(
    caller: Caller, redis_server: RedisServer, lease_s: int = LEASE_S, gateways: int | None = None, **more: object
) -> SharedWindows:
    house = caller.house
    return SharedWindows(
        redis_server.url, house.shared, house.metrics, timeout_s=5.0, gateways=gateways, lease_s=lease_s, **more
    )


@pytest.mark.parametrize(("told", "found"), [(None, 2), (5, 5)])
async def test_gateways_that_are_gone_count_no_more_and_a_number_that_the_operator_says_stays(
    redis_server, told, found
):
    async with calling(redis_url=redis_server.url) as caller:
        windows = shared_windows(caller, redis_server, gateways=told)
        running = asyncio.create_task(windows.run())
        now = redis_server.client.time()[0]
        redis_server.client.zadd(GATEWAYS, {"there": now - FORGOTTEN_S / 2, "gone": now - 12})
        await windows.beat()
        assert redis_server.client.zcard(GATEWAYS) == 2
        assert windows.gateways == caller.house.counted("glimpse_quota_gateways") == found
        await cancelled(running)


async def test_open_requests_count_as_long_as_their_gateway_is_there(redis_server):
    """The places of a gateway that died come back; those of one that is there outlast every lease."""
    async with calling(redis_url=redis_server.url) as caller:
        dead, alive, other = (shared_windows(caller, redis_server, lease_s=3) for _ in range(3))
        running = [asyncio.create_task(each.run()) for each in (dead, alive, other)]
        assert await alive.take("tenant/acme", 2)
        assert await dead.take("tenant/acme", 2)
        assert not await other.take("tenant/acme", 2)
        await cancelled(running.pop(0))
        await eventually_async(lambda: other.take("tenant/acme", 2), 10, "the dead gateway's place came back")
        assert not await other.take("tenant/acme", 2)
        for task in running:
            await cancelled(task)


async def test_a_place_counts_until_its_request_ends_even_if_redis_forgot_it(redis_server):
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 5.0, "quota_concurrent_requests": 1}
    async with calling(**settings) as one, calling(**settings) as two:
        one.house.language.gate.clear()
        asked = asyncio.create_task(one.ask())
        await until(lambda: one.house.language.open == 1)
        redis_server.client.flushall()

        async def refused() -> bool:
            return (await two.ask()).status_code == 429

        await eventually_async(refused, 10, "the place counts again")
        one.house.language.gate.set()
        assert (await asked).status_code == 200


SOON_S = LEASE_S / 2  # before a lease could help


async def test_a_place_that_redis_gave_too_late_comes_back_with_its_request(redis_server):
    """The gateway had stopped waiting, and counted for itself."""
    settings = {"redis_url": redis_server.url, "quota_concurrent_requests": 1}
    async with calling(**settings, redis_timeout_s=0.2) as late, calling(**settings, redis_timeout_s=5.0) as other:
        one, two = (each.house.quotas.windows for each in (late, other))
        await one.beat()  # it is connected
        redis_server.pause()
        taken = await one.take("tenant/acme", 1)
        redis_server.resume()
        assert taken
        await until(lambda: redis_server.client.keys("*{tenant/acme}"))
        assert not await two.take("tenant/acme", 1)
        late.house.quotas.later(one.leave("tenant/acme"))
        await eventually_async(lambda: two.take("tenant/acme", 1), SOON_S, "the place came back")


async def test_a_place_comes_back_if_its_request_ends_while_redis_stalls(redis_server):
    settings = {"redis_url": redis_server.url, "quota_concurrent_requests": 1}
    async with calling(**settings, redis_timeout_s=0.2) as late, calling(**settings, redis_timeout_s=5.0) as other:
        one, two = (each.house.quotas.windows for each in (late, other))
        await eventually_async(lambda: one.take("tenant/acme", 1), 10, "the place is taken")
        await until(lambda: redis_server.client.keys("*{tenant/acme}"))
        redis_server.pause()
        while late.house.shared.in_use:
            await one.beat()
        await one.leave("tenant/acme")()
        redis_server.resume()
        await until(lambda: late.house.shared.in_use and other.house.shared.in_use)
        await eventually_async(lambda: two.take("tenant/acme", 1), SOON_S, "the place came back")


async def test_a_place_that_redis_never_knew_of_is_left_without_a_fault(redis_server):
    async with calling(redis_url=redis_server.url, redis_timeout_s=0.2) as caller:
        windows = shared_windows(caller, redis_server)
        redis_server.kill()
        while caller.house.shared.in_use:
            await windows.beat()
        assert await windows.take("tenant/acme", 1)
        assert not await windows.take("tenant/acme", 1)
        await windows.leave("tenant/acme")()
        assert await windows.take("tenant/acme", 1)


async def test_a_take_that_was_cancelled_holds_no_place(redis_server):
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 5.0, "quota_concurrent_requests": 1}
    async with calling(**settings) as one, calling(**settings) as two:
        await one.house.quotas.windows.beat()  # it is connected
        redis_server.pause()
        taking = asyncio.create_task(one.house.quotas.windows.take("tenant/acme", 1))
        await turns()  # it is asked
        await cancelled(taking)
        redis_server.resume()
        await until(lambda: redis_server.client.keys("*{tenant/acme}"))
        await eventually_async(lambda: two.house.quotas.windows.take("tenant/acme", 1), SOON_S, "the place is free")


async def test_a_take_that_is_refused_while_a_heartbeat_tells_of_it_is_corrected_at_once(redis_server):
    async with calling(redis_url=redis_server.url) as caller:
        crowded, other = (shared_windows(caller, redis_server, lease_s=60) for _ in range(2))
        lanes = [asyncio.create_task(each.run()) for each in (crowded, other)]
        assert await other.take("tenant/acme", 1)
        taken, _ = await asyncio.gather(crowded.take("tenant/acme", 1), crowded.beat())
        assert not taken
        (told,) = redis_server.client.hgetall("glimpse:quota:held:{tenant/acme}")  # the other's alone
        rest = other.leave("tenant/acme")
        assert rest is not None
        await rest()
        assert await other.take("tenant/acme", 1)
        assert redis_server.client.hgetall("glimpse:quota:held:{tenant/acme}").keys() == {told}
        for lane in lanes:
            await cancelled(lane)


async def test_a_user_of_redis_without_the_commands_has_its_part_and_keeps_the_cache(redis_server):
    """The commands are refused, and the connection is in order: features are still shared."""
    redis_server.client.execute_command(
        "ACL", "SETUSER", "limited", "on", ">secret", "~glimpse:*", "+get", "+set", "+unlink"
    )
    url = redis_server.url.replace("redis://", "redis://limited:secret@")
    async with calling(redis_url=url, redis_timeout_s=5.0, quota_requests_per_minute=5, quota_gateways=1) as caller:
        assert await statuses(caller, times=8) == {200: 5, 429: 3}
        assert caller.house.counted("glimpse_quota_is_local") == 1
        assert caller.house.counted("glimpse_redis_errors_total", kind="denied") > 0
        await until(lambda: caller.house.shared.in_use)  # a timeout of a busy machine ends


async def test_each_question_of_a_batch_counts_and_the_batch_has_one_place():
    async with calling(quota_requests_per_minute=4, quota_concurrent_requests=1) as caller:
        batch = [ASKED | {"timeout_s": 0.5}] * 5  # too short to wait for the next minute
        response = await caller.http.post("/v1/vqa/batch", json=batch)
        results = [json.loads(line) for line in response.text.splitlines()]
        codes = Counter(result.get("error", {}).get("code", "ok") for result in results)
        assert codes == {"ok": 3, "rate_limit_exceeded": 2}
