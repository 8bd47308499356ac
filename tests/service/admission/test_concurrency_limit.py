"""The window: what narrows and widens it, and what it is for, by a simulation of an LLM that all share."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.concurrency_limit import NARROWED, ONE_QUEUE_S, PATIENCE, Window
from service.admission.fidelity import LEVELS, Fidelity
from service.admission.scheduler import Claim, Kind, Resource, Scheduler


def narrowed(widest: float = 10.0, inside: int = 10) -> Window:
    window = Window(widest)
    for number in range(inside):
        window.enter(number, 0.0)
    window.leave(0, 5.0, answered=False, missed=True)
    return window


def test_those_that_were_worked_on_together_narrow_it_once():
    window = narrowed()
    assert window.width == pytest.approx(NARROWED * 10)
    for number in range(1, 10):
        window.leave(number, 5.0, answered=False, missed=True)
    assert window.width == pytest.approx(NARROWED * 10)
    window.enter("later", 5.0)
    window.leave("later", 9.0, answered=False, missed=True)
    assert window.width == 1.0


def test_a_miss_among_many_that_rest_does_not_widen_it():
    window = narrowed(20, inside=20)
    for number in range(1, 20):
        window.leave(number, 5.0, answered=False, missed=False)
    for number in range(60):
        window.enter(("caller", number), 6.0)
        window.rest(("caller", number))
    window.work(("caller", 0))
    window.leave(("caller", 0), 20.0, answered=False, missed=True)
    assert window.width == 1.0  # one was worked on


def test_a_miss_among_more_than_it_lets_in_does_not_widen_it():
    window = narrowed(20, inside=20)
    for number in range(60):  # each rested, let the next one in, and goes on
        window.enter(("caller", number), 6.0)
    width = window.width
    window.leave(("caller", 0), 20.0, answered=False, missed=True)
    assert window.width == width


def test_it_widens_by_one_when_as_many_were_answered_as_it_lets_in():
    window = narrowed()
    for number in range(1, 7):
        window.leave(number, 6.0, answered=True, missed=False)
    assert window.width == pytest.approx(NARROWED * 10 + 1, abs=0.1)


def test_who_hangs_up_says_nothing_about_it():
    window = Window(4)
    window.enter("caller", 0.0)
    window.leave("caller", 1.0, answered=False, missed=False)
    window.leave("nobody", 1.0, answered=False, missed=True)
    assert not window.is_narrow


def test_who_gives_itself_less_time_than_answers_take_says_nothing_about_it():
    window = Window(4)
    window.enter("answered", 0.0)
    window.leave("answered", 1.0, answered=True, missed=False)
    for number in range(50):
        window.enter(number, float(number))
        window.leave(number, number + 0.05, answered=False, missed=True)
    assert not window.is_narrow


def test_without_an_end_it_is_never_narrow():
    assert not narrowed(math.inf).is_narrow


def test_a_narrow_window_lets_in_who_is_inside_and_who_is_alone():
    window = narrowed()
    assert window.lets_in(3)
    assert not window.lets_in("new")
    for number in range(1, 10):
        window.leave(number, 5.0, answered=False, missed=True)
    assert window.lets_in("new")


def test_who_rests_leaves_its_room_to_others_and_stays_inside():
    window = narrowed(10)
    for number in range(1, 6):
        assert window.rest(number)
        assert not window.rest(number)
    assert window.lets_in("new")  # four work, six may
    window.work(5)
    window.work(4)
    assert not window.lets_in("new")
    assert window.lets_in(1)
    assert not window.rest("outside")


def test_nobody_waits_long_for_a_first_turn_while_it_is_narrow():
    assert narrowed().latest_start(10.0, 20.0) == pytest.approx(10 + 10 * PATIENCE)
    assert Window(10).latest_start(10.0, 20.0) == 20.0


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["enter", "answered", "missed", "gone"]))))
def test_it_stays_between_one_and_the_widest(steps):
    window = Window(6)
    for now, (request, step) in enumerate(steps):
        if step == "enter":
            window.enter(request, now)
        else:
            window.leave(request, now, answered=step == "answered", missed=step == "missed")
        assert 1.0 <= window.width <= 6.0


class House:
    """A vision stage and an LLM on the same cores, both shared by all that they work on; requests wait 5 s."""

    ROWS, IMAGES, PATIENCE_S, STEP_S = 32, 6, 5.0, 0.02

    def __init__(self, window: Window) -> None:
        self.scheduler = Scheduler(self.IMAGES, self.ROWS, window=window)
        self.work: dict[Resource, dict[Claim, float]] = {resource: {} for resource in Resource}
        self.answered: list[float] = []
        self.fidelity = Fidelity(target_s=1.0, now=0.0)  # in force on nothing: only watched
        self.levels: list[int] = []  # a second

    def claim(self, resource: Resource, now: float, deadline: float, request: object) -> None:
        kind = Kind.SINGLE_IMAGE if resource is Resource.VISION else Kind.FOLLOW_UP
        claim = Claim(resource, 1, kind, now, deadline, request=request)
        if self.scheduler.submit(claim, now) is not None:
            self.scheduler.window.leave(request, now, answered=False, missed=False)

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
            for claim in self.scheduler.schedule(now)[0]:
                self.work[claim.resource][claim] = 0.0
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
            self.scheduler.window.leave(claim.request, now, answered=finished, missed=not finished)
        self.scheduler.release(claim, now, finished=finished)
        if finished and claim.resource is Resource.VISION:
            self.claim(Resource.LLM, now, claim.deadline, claim.request)
        elif finished:
            self.answered.append(now)


@pytest.mark.parametrize("new", [0.0, 0.5])
def test_overload_takes_no_more_than_a_fifth_of_what_is_answered_in_time(new):
    widest = House.ROWS + House.IMAGES
    best = max(House(Window(widest)).run(rate, new) for rate in (0.8, 1.2, 1.5))
    for rate in (4.5, 6.0):
        assert House(Window(widest)).run(rate, new) >= 0.8 * best
    assert House(Window()).run(4.5, new) < 0.2 * best  # all in at once: nobody in time


@pytest.mark.parametrize("new", [0.0, 0.5])
def test_under_overload_all_look_less_closely_though_nobody_waits_for_long(new):
    """A fifth of 5 s is no longer than the target: the wait that counts is that of those who are turned away."""
    house = House(Window(House.ROWS + House.IMAGES))
    house.run(4.5, new)
    assert set(house.levels[60:]) == {len(LEVELS) - 1}
    calm = House(Window(House.ROWS + House.IMAGES))
    calm.run(0.5, new)
    assert set(calm.levels) == {0}


def test_those_turned_away_one_after_the_other_are_one_queue():
    window = narrowed()
    assert window.kept_out_since(5.0) is None
    for arrived in (6.0, 6.5, 7.4):
        window.turn_away(arrived, arrived + 0.5)
    assert window.kept_out_since(8.0) == 6.0
    assert window.kept_out_since(7.9 + ONE_QUEUE_S + 0.1) is None
    window.turn_away(20.0, 20.0)
    assert window.kept_out_since(20.0) == 20.0
    wide = Window(10.0)
    wide.turn_away(1.0, 1.0)
    assert wide.kept_out_since(1.0) is None
