"""The asyncio side of who may enter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from benchmarks.bench.orders import Fifo
from service.admission.admission import (
    ENCODER_FILLS,
    MAX_LAG_S,
    OBSERVE_S,
    READ_REFUSAL_S,
    READ_REFUSALS,
    UNHURRIED,
    Admission,
    Reservation,
    Size,
)
from service.admission.fidelity import LEVELS
from service.admission.quota import Cost, Refusal
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.core.card import Engines
from service.core.errors import DeadlineExceeded, Overloaded, ShuttingDown
from service.core.request import Priority
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.support.fakes import CARD, cancelled, turns, until
from tests.support.samples import sample

IMPATIENT_S = 1e-4  # a target that whoever waits at all is over


def admission(metrics: Metrics, scheduling: type[Scheduler] = Scheduler, **knobs: object) -> Admission:
    return Admission(Settings(vision_slots=1, **knobs), Engines(), CARD.max_positions, metrics, scheduling)


async def enter(reservation: Reservation) -> Claim:
    now = time.monotonic()
    claim = Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 100)
    await reservation.enter(claim)
    return claim


async def test_while_one_waits_past_the_target_requests_may_look_less_closely_and_the_log_says_so():
    metrics = Metrics()
    house = admission(metrics, fidelity_target_s=IMPATIENT_S)
    assert house.level_now() == LEVELS[0]
    with house.reservation("") as first, house.reservation("") as second, capture_logs() as lines:
        slot = await enter(first)
        waiting = asyncio.create_task(enter(second))
        await until(lambda: sample(metrics, "glimpse_fidelity_level") == 1)
        assert house.level_now() == LEVELS[1]
        first.give_back(slot)
        await waiting
    assert sample(metrics, "glimpse_fidelity_changes_total") == 1
    assert lines == [
        {
            "event": "fidelity",
            "log_level": "info",
            "reason": "waiting",
            "fidelity_level": 1,
            "vision_tokens": 192,
            "visual_tokens": 96,
            "frames": 16,
        },
    ]


async def test_the_longest_wait_is_looked_for_once_in_a_while_however_often_requests_ask(monkeypatch):
    house, looks = admission(Metrics()), list[float]()
    monkeypatch.setattr(house.fidelity, "observe", lambda now, _: looks.append(now) or 0)
    now = time.monotonic() + 1
    for number in range(100):
        house.schedule(now + number * OBSERVE_S / 10)
    assert 9 <= len(looks) <= 11


async def worked_on_together(house: Admission, first: Reservation, second: Reservation, priority: Priority) -> None:
    """Both at once, until longer than what they can spare of their time."""
    for reservation in (first, second):
        now = time.monotonic()
        await reservation.enter(Claim(Resource.LLM, 1, Kind.FOLLOW_UP, now, now + 0.1, priority=priority))
    await until(lambda: time.monotonic() - now > 0.1)
    assert house.scheduler.waiting(Kind.FOLLOW_UP) == 0


async def test_while_those_worked_on_together_may_be_late_requests_look_less_closely_and_the_log_says_why():
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S)
    with house.reservation("") as first, house.reservation("") as second, capture_logs() as lines:
        await worked_on_together(house, first, second, Priority.NORMAL)
        await until(lambda: house.level_now() == LEVELS[1])
    assert [(line["fidelity_level"], line["reason"]) for line in lines] == [(1, "late")]


@pytest.mark.parametrize(("priority", "is_late"), [(Priority.NORMAL, True), (Priority.LOW, False)])
async def test_those_that_may_wait_for_others_are_never_late_for_them(priority, is_late):
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S)
    with house.reservation("") as first, house.reservation("") as second:
        await worked_on_together(house, first, second, priority)
        assert (house.contention.waiting_since(time.monotonic()) is not None) == is_late


async def test_switched_off_nobody_looks_less_closely():
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S, elastic_fidelity=False)
    with house.reservation("") as first, house.reservation("") as second:
        await enter(first)
        begun = time.monotonic()
        waiting = asyncio.create_task(enter(second))
        await until(lambda: time.monotonic() - begun > 0.1)
        assert house.level_now() == LEVELS[0]
        await cancelled(waiting)


async def test_in_one_queue_who_came_first_goes_first_though_it_claims_later():
    house = admission(Metrics(), scheduling=Fifo)
    with house.reservation("") as first, house.reservation("") as second, house.reservation("") as third:
        slot = await enter(first)
        last = asyncio.create_task(enter(third))
        await turns()
        waiting = asyncio.create_task(enter(second))
        await turns()
        first.give_back(slot)
        async with asyncio.timeout(5):
            second.give_back(await waiting)
            await last


async def test_who_leaves_the_window_makes_room_though_it_holds_nothing():
    house = admission(Metrics())
    house.limit.width = 1.0
    with house.reservation("") as second:
        with house.reservation("") as first:
            first.give_back(await enter(first))
            waiting = asyncio.create_task(enter(second))
            await turns()
            assert not waiting.done()
        async with asyncio.timeout(5):
            await waiting


def keep_busy(house: Admission, now: float) -> None:
    """One has the slot, one waits, and slots come free every five seconds."""
    others = [Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now - 10, now + 100) for _ in range(3)]
    for other in others:
        house.scheduler.submit(other, now - 10)
    house.scheduler.schedule(now - 10)
    house.scheduler.release(others[0], now - 5)
    house.scheduler.schedule(now - 5)


async def test_a_claim_that_was_refused_is_no_work():
    house = admission(Metrics())
    now = time.monotonic()
    keep_busy(house, now)
    with house.reservation("") as reservation:
        room = Claim(Resource.LLM, 1, Kind.FOLLOW_UP, now, now + 100)
        await reservation.enter(room)
        with pytest.raises(Overloaded):
            await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 5))
        reservation.give_back(room)
        house.limit.width = 1.0
        assert not house.limit.allows("new")
        with reservation.waiting_for_others():
            assert house.limit.allows("new")


async def test_who_waits_for_others_makes_room_in_the_window_but_for_what_it_claims():
    house = admission(Metrics())
    house.limit.width = 1.0
    with house.reservation("") as first:
        slot = await enter(first)
        with first.waiting_for_others():
            with house.reservation("") as second:
                waiting = asyncio.create_task(enter(second))
                await turns()
                assert not waiting.done()
                first.give_back(slot)
                async with asyncio.timeout(5):
                    second.give_back(await waiting)
            house.limit.width = 1.0
            assert house.limit.allows("new")
            again = await enter(first)  # inside it still is, and works again
            assert not house.limit.allows("new")
            first.give_back(again)
        assert not house.limit.allows("new")


async def test_the_longest_request_fits_however_few_may_be_in_flight():
    settings = Settings(max_requests_in_flight=1, llm_tokens=CARD.max_positions)
    limits = Admission(settings, Engines(llm_rows=16), CARD.max_positions, Metrics()).quota.limits
    assert limits.tokens == CARD.max_positions


@pytest.mark.parametrize(("wait_s", "told_s"), [(0.0, 1.0), (7.0, 7.0), (1e6, 60.0)])
async def test_retry_after_lies_between_a_second_and_a_minute(wait_s, told_s):
    refusal = Refusal("saturated", "full", wait_s)
    assert admission(Metrics()).refuse(refusal).retry_after_s == told_s


async def test_a_request_whose_deadline_is_over_gets_a_504_also_where_the_queue_is_too_long():
    """A 429 would tell it to come back as it is. It counts as one that was read and refused."""
    house = admission(Metrics())
    with house.reservation("") as first, house.reservation("") as second:
        slot = await enter(first)
        waiting = asyncio.create_task(enter(second))
        await turns()
        now = time.monotonic()
        drain = house.scheduler._pools[Resource.VISION].drain
        drain.observe(now - 20, 0.0, wanted=True)
        drain.observe(now, 1.0, wanted=True)  # one place in 20 s
        over = Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now)
        assert house.scheduler.refusal(over, now) is not None
        with house.reservation("", Size.SMALL) as third:
            with pytest.raises(DeadlineExceeded, match="over before the request could start"):
                await third.enter(over)
            assert house._refused_at[Size.SMALL] >= now
        first.give_back(slot)
        assert (await waiting).granted_at is not None


async def test_a_request_whose_deadline_passes_in_the_queue_gets_a_504_and_one_that_expires_before_it_a_429():
    house = admission(Metrics())
    now = time.monotonic()
    with house.reservation("") as first, house.reservation("") as second:
        slot = await enter(first)
        late = Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 0.05)
        waiting = asyncio.create_task(second.enter(late))
        await until(lambda: time.monotonic() > now + 0.05)
        house.schedule(time.monotonic())
        with pytest.raises(DeadlineExceeded):
            await waiting
        slot.granted_at -= 50  # the slot was held for 50 s: work takes as long
        first.give_back(slot)
    with house.reservation("") as first, house.reservation("") as second:
        await enter(first)
        waiting = asyncio.create_task(second.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 60)))
        await turns()
        house.schedule(now + 20)
        with pytest.raises(Overloaded):
            await waiting


async def test_on_its_way_up_the_log_gives_the_reason_and_on_its_way_down_calm():
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S)
    with house.reservation("") as first, house.reservation("") as second, capture_logs() as lines:
        slot = await enter(first)
        waiting = asyncio.create_task(enter(second))
        await until(lambda: house.level_now() == LEVELS[1])
        first.give_back(slot)
        second.give_back(await waiting)
        await until(lambda: house._later is None)  # it was seen that nobody waits
    with capture_logs() as later:
        house.schedule(time.monotonic() + 10)
    assert [line["reason"] for line in (*lines, *later)] == ["waiting", "calm"]


@pytest.mark.parametrize("answered", [True, False])
async def test_only_an_answer_tells_how_long_answers_take(answered):
    house = admission(Metrics())
    with suppress(ValueError), house.reservation("") as reservation:
        await enter(reservation)
        if not answered:
            raise ValueError
    assert (house.contention.own_s > 0) == answered
    assert len(house.contention) == 0


@pytest.mark.parametrize(
    ("timeout_s", "answered", "narrows"), [(0.02, False, True), (0.02, True, False), (100, False, False)]
)
async def test_a_request_that_fails_past_its_deadline_narrows_the_limit_and_no_other_does(timeout_s, answered, narrows):
    house = admission(Metrics())
    with suppress(ValueError), house.reservation("") as reservation:
        now = time.monotonic()
        await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + timeout_s))
        await until(lambda: time.monotonic() >= now + min(timeout_s, 0.02))
        if not answered:
            raise ValueError
    assert house.limit.is_narrow == narrows


@pytest.mark.parametrize(("told", "slots"), [(None, 4 * ENCODER_FILLS), (5, 5)])
def test_as_many_images_are_in_work_as_keep_the_encoder_busy_and_the_widest_limit_has_room_for_all(told, slots):
    house = Admission(Settings(vision_slots=told), Engines(encoder_images=4, llm_rows=7), CARD.max_positions, Metrics())
    now = time.monotonic()
    images = [Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 100, request=object()) for _ in range(20)]
    answers = [Claim(Resource.LLM, house.row_tokens, Kind.FOLLOW_UP, now, now + 100, request=object()) for _ in images]
    for claim in images + answers:
        house.scheduler.submit(claim, now)
    house.schedule(now)
    granted = [sum(claim.granted_at is not None for claim in claims) for claims in (images, answers)]
    assert granted == [slots, 7]


LATE_S = 2 * MAX_LAG_S


def takes(house: Admission, open_requests: int, lag_s: float = 0.0, size: Size = Size.LARGE) -> bool:
    """Whether it reads one more request."""
    try:
        house.refuse_early(open_requests, lag_s, size)
    except Overloaded:
        return False
    return True


def test_a_crowd_is_refused_unread_while_the_loop_is_late():
    house = admission(Metrics())
    assert takes(house, UNHURRIED + 1, MAX_LAG_S)
    assert not takes(house, UNHURRIED + 1, 2 * MAX_LAG_S)
    assert takes(house, UNHURRIED, 1000.0)


def test_a_crowd_is_refused_unread_while_there_is_no_room():
    house = admission(Metrics(), max_requests_in_flight=2)
    with house.reservation("") as first, house.reservation("") as second:
        first.reserve(Cost(tokens=house.row_tokens))
        assert takes(house, UNHURRIED + 1)
        second.reserve(Cost(tokens=house.row_tokens))
        assert not takes(house, UNHURRIED + 1)
        assert takes(house, UNHURRIED)
    assert takes(house, UNHURRIED + 1)


async def test_a_crowd_is_refused_unread_for_a_moment_after_a_refusal():
    house = admission(Metrics())
    now = time.monotonic()
    keep_busy(house, now)
    with house.reservation("", Size.LARGE) as reservation:
        with pytest.raises(Overloaded):
            await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 5))
        assert takes(house, UNHURRIED)
        assert not takes(house, UNHURRIED + 1)
        await until(lambda: takes(house, UNHURRIED + 1))


async def test_callers_that_are_refused_at_once_are_refused_unread_while_the_loop_is_late_however_few_are_open():
    house = admission(Metrics())
    now = time.monotonic()
    keep_busy(house, now)
    for count in range(4 * READ_REFUSALS):
        assert takes(house, 1, LATE_S) or count >= READ_REFUSALS
        with house.reservation("", Size.LARGE) as reservation, pytest.raises(Overloaded):
            await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 5))
    assert not takes(house, 1, LATE_S)
    assert takes(house, 1, LATE_S, Size.SMALL)  # large requests alone were refused
    assert takes(house, 1, LATE_S, Size.UNKNOWN)
    assert takes(house, 1)  # one caller whose questions cannot be in time must not close the door to the others
    await until(lambda: takes(house, 1, LATE_S))


async def test_many_refusals_at_once_close_the_door_for_a_burst_at_most():
    house = admission(Metrics())
    now = time.monotonic()
    keep_busy(house, now)
    for _ in range(20 * READ_REFUSALS):
        with house.reservation("", Size.SMALL) as reservation, pytest.raises(Overloaded):
            await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 5))
    assert not takes(house, 1, LATE_S, Size.SMALL)
    await asyncio.sleep(1.1 * READ_REFUSALS * READ_REFUSAL_S)
    assert takes(house, 1, LATE_S, Size.SMALL)


async def test_what_came_through_no_door_closes_none():
    house = admission(Metrics())
    now = time.monotonic()
    keep_busy(house, now)
    for _ in range(2 * READ_REFUSALS):
        with house.reservation("") as reservation, pytest.raises(Overloaded):  # as questions of a batch
            await reservation.enter(Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + 5))
    assert all(takes(house, UNHURRIED, LATE_S, size) for size in Size)


@pytest.mark.parametrize(("nbytes", "size"), [(None, "unknown"), (0, "small"), (4096, "small"), (4097, "large")])
def test_a_request_has_the_size_that_its_body_declares(nbytes, size):
    assert Size.of(nbytes) == size


async def test_what_a_request_holds_is_let_go_of_when_it_is_over_and_not_when_a_part_of_it_is():
    house, closed = admission(Metrics()), list[str]()
    with house.reservation("t") as reservation:
        reservation.held.callback(closed.append, "held")
        reservation.reserve(Cost(nbytes=10))
        with reservation.work():
            reservation.reserve(Cost(nbytes=5, pixels=7))
        assert house.quota.held == Cost(nbytes=10)
        assert closed == []
    assert (house.quota.held, closed) == (Cost(), ["held"])


async def test_works_that_a_request_left_behind_keep_its_body_and_what_it_holds_until_the_last_one_ends():
    house, closed = admission(Metrics()), list[str]()
    with house.reservation("t") as reservation:
        reservation.held.callback(closed.append, "held")
        reservation.reserve(Cost(nbytes=10))
        with reservation.work():
            reservation.reserve(Cost(nbytes=5, pixels=7, tokens=3))
            first = reservation.hand_over(await enter(reservation), Cost(pixels=4))
            assert house.quota.held == Cost(nbytes=15, pixels=7, tokens=3)
            first()
            assert house.quota.held == Cost(nbytes=15, pixels=3, tokens=3)
            second = reservation.hand_over(await enter(reservation))
            reservation.hand_over(await enter_soon(house, reservation, second))()
        assert (house.quota.held, closed) == (Cost(nbytes=10), [])
        third = reservation.hand_over(await enter(reservation))
    assert (house.quota.held, closed) == (Cost(nbytes=10), [])
    third()
    assert (house.quota.held, closed) == (Cost(), ["held"])


async def enter_soon(house: Admission, reservation: Reservation, give_back: Callable[[], None]) -> Claim:
    """Enter as soon as the slot is given back."""
    waiting = asyncio.create_task(enter(reservation))
    await turns()
    assert not waiting.done()
    give_back()
    return await waiting


async def test_a_request_whose_own_time_is_just_over_does_not_keep_others_from_being_ended():
    house = admission(Metrics())
    told: list[str] = []

    async def wait(name: str, timeout_s: float | None, cleaning: asyncio.Event) -> None:
        with house.reservation("") as reservation, suppress(ShuttingDown, TimeoutError):
            async with reservation.until_end(timeout_s):
                try:
                    await asyncio.Event().wait()
                finally:
                    await cleaning.wait()
                    told.append(name)

    slow, quick = asyncio.Event(), asyncio.Event()
    quick.set()
    late = asyncio.create_task(wait("late", 0.01, slow))
    others = [asyncio.create_task(wait(f"other {number}", None, quick)) for number in range(4)]
    await asyncio.sleep(0.05)  # the late one cleans up
    house.end()
    await asyncio.wait_for(asyncio.gather(*others), 5)
    assert sorted(told) == [f"other {number}" for number in range(4)]
    slow.set()
    await late
