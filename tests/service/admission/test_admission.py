"""The asyncio side of who may enter."""

from __future__ import annotations

import asyncio
import time

import pytest
from structlog.testing import capture_logs

from benchmarks.bench.orders import Fifo
from service.admission.admission import Admission, Reservation
from service.admission.fidelity import LEVELS
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.core.card import Engines
from service.core.errors import Overloaded
from service.core.request import Priority
from service.metrics import Metrics
from service.settings import Settings
from tests.support.fakes import CARD, cancelled, turns, until

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
    assert house.fidelity == LEVELS[0]
    with house.reservation("") as first, house.reservation("") as second, capture_logs() as lines:
        slot = await enter(first)
        waiting = asyncio.create_task(enter(second))
        await until(lambda: metrics.registry.get_sample_value("glimpse_fidelity_level") == 1)
        assert house.fidelity == LEVELS[1]
        first.give_back(slot)
        await waiting
    assert metrics.registry.get_sample_value("glimpse_fidelity_changes_total") == 1
    assert lines == [
        {
            "event": "fidelity",
            "log_level": "info",
            "reason": "waiting",
            "fidelity_level": 1,
            "vision_tokens": 192,
            "visual_tokens": 96,
        },
    ]


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
        await until(lambda: house.fidelity == LEVELS[1])
    assert [(line["fidelity_level"], line["reason"]) for line in lines] == [(1, "late")]


async def test_those_that_may_wait_for_others_are_never_late_for_them():
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S)
    with house.reservation("") as first, house.reservation("") as second:
        await worked_on_together(house, first, second, Priority.LOW)
        for _ in range(3):
            await turns()
            assert house.fidelity == LEVELS[0]


async def test_switched_off_nobody_looks_less_closely():
    house = admission(Metrics(), fidelity_target_s=IMPATIENT_S, elastic_fidelity=False)
    with house.reservation("") as first, house.reservation("") as second:
        await enter(first)
        begun = time.monotonic()
        waiting = asyncio.create_task(enter(second))
        await until(lambda: time.monotonic() - begun > 0.1)
        assert house.fidelity == LEVELS[0]
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


async def test_a_claim_that_was_refused_is_no_work():
    house = admission(Metrics())
    now = time.monotonic()
    others = [Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now - 10, now + 100) for _ in range(3)]
    for other in others:
        house.scheduler.submit(other, now - 10)
    house.scheduler.schedule(now - 10)
    house.scheduler.release(others[0], now - 5)
    house.scheduler.schedule(now - 5)  # one has the slot, one waits, and slots come free every five seconds
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
