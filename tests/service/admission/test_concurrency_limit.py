"""The limit: what narrows and widens it, and what it is for, by a simulation of an LLM that all share."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.concurrency_limit import DECREASE, ONE_QUEUE_S, PATIENCE, ConcurrencyLimit
from service.admission.fidelity import LEVELS, Fidelity
from service.admission.scheduler import Claim, Kind, Resource, Scheduler


def narrowed(widest: float = 10.0, inside: int = 10) -> ConcurrencyLimit:
    limit = ConcurrencyLimit(widest)
    for number in range(inside):
        limit.contention.start(number, 0.0, 10.0)
    limit.end(0, 5.0, answered=False, missed=True)
    return limit


def test_those_that_were_worked_on_together_narrow_it_once():
    limit = narrowed()
    assert limit.width == pytest.approx(DECREASE * 10)
    for number in range(1, 10):
        limit.end(number, 5.0, answered=False, missed=True)
    assert limit.width == pytest.approx(DECREASE * 10)
    limit.contention.start("later", 5.0, 10.0)
    limit.end("later", 9.0, answered=False, missed=True)
    assert limit.width == 1.0


def test_a_miss_among_many_that_rest_does_not_widen_it():
    limit = narrowed(20, inside=20)
    for number in range(1, 20):
        limit.end(number, 5.0, answered=False, missed=False)
    for number in range(60):
        limit.contention.start(("caller", number), 6.0, 10.0)
        limit.contention.pause(("caller", number))
    limit.contention.resume(("caller", 0))
    limit.end(("caller", 0), 20.0, answered=False, missed=True)
    assert limit.width == 1.0  # one was worked on


def test_a_miss_among_more_than_it_lets_in_does_not_widen_it():
    limit = narrowed(20, inside=20)
    for number in range(60):  # each rested, let the next one in, and goes on
        limit.contention.start(("caller", number), 6.0, 10.0)
    width = limit.width
    limit.end(("caller", 0), 20.0, answered=False, missed=True)
    assert limit.width == width


def test_it_widens_by_one_when_as_many_were_answered_as_it_lets_in():
    limit = narrowed()
    for number in range(1, 7):
        limit.end(number, 6.0, answered=True, missed=False)
    assert limit.width == pytest.approx(DECREASE * 10 + 1, abs=0.1)


def test_who_hangs_up_says_nothing_about_it():
    limit = ConcurrencyLimit(4)
    limit.contention.start("caller", 0.0, 10.0)
    limit.end("caller", 1.0, answered=False, missed=False)
    limit.end("nobody", 1.0, answered=False, missed=True)
    assert not limit.is_narrow


def test_a_miss_after_as_long_as_an_answer_takes_narrows_it():
    limit = ConcurrencyLimit(4)
    limit.contention.start("answered", 0.0, 10.0)
    limit.end("answered", 1.0, answered=True, missed=False)
    limit.contention.start("missed", 1.0, 10.0)
    limit.end("missed", 2.0, answered=False, missed=True)
    assert limit.is_narrow


def test_who_gives_itself_less_time_than_answers_take_says_nothing_about_it():
    limit = ConcurrencyLimit(4)
    limit.contention.start("answered", 0.0, 10.0)
    limit.end("answered", 1.0, answered=True, missed=False)
    for number in range(50):
        limit.contention.start(number, float(number), 10.0)
        limit.end(number, number + 0.05, answered=False, missed=True)
    assert not limit.is_narrow


def test_without_an_end_it_is_never_narrow():
    assert not narrowed(math.inf).is_narrow


def test_a_narrow_limit_lets_in_who_is_inside_and_who_is_alone():
    limit = narrowed()
    assert limit.allows(3)
    assert not limit.allows("new")
    for number in range(1, 10):
        limit.end(number, 5.0, answered=False, missed=True)
    assert limit.allows("new")


def test_who_rests_leaves_its_room_to_others_and_stays_inside():
    limit = narrowed(10)
    for number in range(1, 6):
        assert limit.contention.pause(number)
        assert not limit.contention.pause(number)
    assert limit.allows("new")  # four work, six may
    limit.contention.resume(5)
    limit.contention.resume(4)
    assert not limit.allows("new")
    assert limit.allows(1)
    assert not limit.contention.pause("outside")


def test_nobody_waits_long_for_a_first_turn_while_it_is_narrow():
    assert narrowed().latest_start(10.0, 20.0) == pytest.approx(10 + 10 * PATIENCE)
    assert ConcurrencyLimit(10).latest_start(10.0, 20.0) == 20.0


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["enter", "answered", "missed", "gone"]))))
def test_it_stays_between_one_and_the_widest(steps):
    limit = ConcurrencyLimit(6)
    for now, (request, step) in enumerate(steps):
        if step == "enter":
            limit.contention.start(request, now, 10.0)
        else:
            limit.end(request, now, answered=step == "answered", missed=step == "missed")
        assert 1.0 <= limit.width <= 6.0


class House:
    """A vision stage and an LLM on the same cores, both shared by all that they work on; requests wait 5 s."""

    ROWS, IMAGES, PATIENCE_S, STEP_S = 32, 6, 5.0, 0.02

    def __init__(self, limit: ConcurrencyLimit) -> None:
        self.scheduler = Scheduler(self.IMAGES, self.ROWS, limit=limit)
        self.work: dict[Resource, dict[Claim, float]] = {resource: {} for resource in Resource}
        self.answered: list[float] = []
        self.fidelity = Fidelity(target_s=1.0, now=0.0)  # in force on nothing: only watched
        self.levels: list[int] = []  # a second

    def claim(self, resource: Resource, now: float, deadline: float, request: object) -> None:
        kind = Kind.SINGLE_IMAGE if resource is Resource.VISION else Kind.FOLLOW_UP
        claim = Claim(resource, 1, kind, now, deadline, request=request)
        if self.scheduler.submit(claim, now) is not None:
            self.scheduler.limit.end(request, now, answered=False, missed=False)

    def run(self, rate: float, new: float, seconds: float = 120.0) -> float:
        """Answers a second in the later half; `new`: the share of requests that need the vision stage."""
        draw, now = random.Random(1), 0.0
        arrival = draw.expovariate(rate)
        while now < seconds:
            now += self.STEP_S
            while arrival <= now:
                stage = Resource.VISION if draw.random() < new else Resource.LLM
                self.claim(stage, now, now + self.PATIENCE_S, object())
                arrival += draw.expovariate(rate)
            self.progress(now)
            granted, expired = self.scheduler.schedule(now)
            for claim in granted:
                self.work[claim.resource][claim] = 0.0
            for claim in expired:
                self.scheduler.limit.end(claim.request, now, answered=False, missed=now >= claim.deadline)
            level = self.fidelity.observe(now, self.scheduler.waiting_since(now))
            if len(self.levels) < now:
                self.levels.append(level)
        return sum(moment > seconds / 2 for moment in self.answered) / (seconds / 2)

    def progress(self, now: float) -> None:
        """The LLM does 2 n / (n + 2) requests a second with n rows, the encoder 2 images; together each half of it."""
        share = 0.5 if all(self.work.values()) else 1.0
        for resource, running in self.work.items():
            rows = len(running)
            pace = 2.0 if resource is Resource.VISION else 2.0 * rows / (rows + 2)
            for claim in list(running):
                running[claim] += pace * share * self.STEP_S / rows
                if done := running[claim] >= 1 or now >= claim.deadline:
                    del running[claim]
                    self.end(claim, now, finished=now < claim.deadline)
                assert done or claim in running

    def end(self, claim: Claim, now: float, finished: bool) -> None:
        if not finished or claim.resource is Resource.LLM:
            self.scheduler.limit.end(claim.request, now, answered=finished, missed=not finished)
        self.scheduler.release(claim, now, finished=finished)
        if finished and claim.resource is Resource.VISION:
            self.claim(Resource.LLM, now, claim.deadline, claim.request)
        elif finished:
            self.answered.append(now)


@pytest.mark.parametrize(("new", "kept"), [(0.0, 0.8), (0.5, 0.6)])
def test_overload_takes_no_more_than_a_fifth_of_what_is_answered_in_time(new, kept):
    """With new images at nine times the load some encodes are lost: their requests expire before the LLM."""
    widest = House.ROWS + House.IMAGES
    best = max(House(ConcurrencyLimit(widest)).run(rate, new) for rate in (0.8, 1.2, 1.5))
    for rate in (4.5, 6.0):
        assert House(ConcurrencyLimit(widest)).run(rate, new) >= kept * best
    assert House(ConcurrencyLimit()).run(4.5, new) < 0.25 * best  # all in at once: hardly anybody in time


@pytest.mark.parametrize("new", [0.0, 0.5])
def test_under_overload_all_look_less_closely_though_nobody_waits_for_long(new):
    """A fifth of 5 s is no longer than the target: the wait that counts is that of those who are turned away."""
    house = House(ConcurrencyLimit(House.ROWS + House.IMAGES))
    house.run(4.5, new)
    assert set(house.levels[60:]) == {len(LEVELS) - 1}
    calm = House(ConcurrencyLimit(House.ROWS + House.IMAGES))
    calm.run(0.5, new)
    assert set(calm.levels) == {0}


def test_those_turned_away_one_after_the_other_are_one_queue():
    limit = narrowed()
    assert limit.refusing_since(5.0) is None
    for arrived in (6.0, 6.5, 7.4):
        limit.refused(arrived, arrived + 0.5)
    assert limit.refusing_since(8.0) == 6.0
    assert limit.refusing_since(7.9 + ONE_QUEUE_S + 0.1) is None
    limit.refused(20.0, 20.0)
    assert limit.refusing_since(20.0) == 20.0
    limit.refused(21.0, 20.0 + ONE_QUEUE_S)
    assert limit.refusing_since(20.0 + ONE_QUEUE_S) == 20.0
    assert limit.refusing_since(20.0 + 2 * ONE_QUEUE_S) == 20.0
    wide = ConcurrencyLimit(10.0)
    wide.refused(1.0, 1.0)
    assert wide.refusing_since(1.0) is None
