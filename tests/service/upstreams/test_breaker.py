"""When requests are kept from a Triton that fails, and when it is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.upstreams.breaker import FAILURES_TO_OPEN, JITTER, LEAST_PAUSE_S, MOST_PAUSE_S, STEADY_S, Breaker, State

CALLS = st.lists(st.tuples(st.sampled_from(["failed", "succeeded"]), st.floats(0, 10)), min_size=1, max_size=60)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(now)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not():
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0)
    breaker.succeeded(0.0)
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0)
    assert breaker.state(0.0) is State.CLOSED
    breaker.failed(0.0)
    assert breaker.state(0.0) is State.OPEN


def test_streams_that_are_cut_open_it_although_each_begins_well_and_probes_succeed():
    breaker = Breaker()
    for number in range(FAILURES_TO_OPEN):
        assert breaker.state(0.0) is State.CLOSED, number
        breaker.succeeded(0.0, is_whole=False)
        breaker.failed(0.0, is_cut=True)
    assert breaker.state(0.0) is State.OPEN


def test_an_answer_that_came_to_its_end_makes_up_for_those_that_were_cut():
    breaker = Breaker()
    for _ in range(10 * FAILURES_TO_OPEN):
        breaker.failed(0.0, is_cut=True)
        breaker.succeeded(0.0)
    assert breaker.state(0.0) is State.CLOSED


def test_a_success_after_the_pause_closes_it_and_the_failures_before_count_no_more():
    breaker = opened()
    assert breaker.state(LEAST_PAUSE_S) is State.HALF_OPEN
    breaker.succeeded(LEAST_PAUSE_S)
    assert breaker.state(LEAST_PAUSE_S) is State.CLOSED
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(LEAST_PAUSE_S)
    assert breaker.state(LEAST_PAUSE_S) is State.CLOSED


def test_one_failure_after_the_pause_opens_it_again():
    breaker = opened()
    breaker.failed(LEAST_PAUSE_S)
    assert breaker.state(LEAST_PAUSE_S) is State.OPEN


def test_a_call_from_before_changes_nothing_while_it_is_open():
    breaker = opened()
    breaker.succeeded(LEAST_PAUSE_S / 2)
    breaker.failed(LEAST_PAUSE_S / 2)
    assert breaker.state(LEAST_PAUSE_S / 2) is State.OPEN
    assert breaker.state(LEAST_PAUSE_S) is State.HALF_OPEN


@pytest.mark.parametrize(("closed_for", "pause_s"), [(STEADY_S / 2, 2 * LEAST_PAUSE_S), (STEADY_S, LEAST_PAUSE_S)])
def test_one_that_opens_again_soon_pauses_longer(closed_for, pause_s):
    breaker = opened(1000.0)
    breaker.succeeded(1000.0 + LEAST_PAUSE_S)
    now = 1000.0 + LEAST_PAUSE_S + closed_for
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(now)
    assert breaker.state(now + 0.99 * pause_s) is State.OPEN
    assert breaker.state(now + pause_s) is State.HALF_OPEN


def test_failed_trials_pause_longer_up_to_the_longest_pause():
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(10):
        begun = now
        while breaker.state(now) is State.OPEN:
            now += 0.125
        pauses.append(now - begun)
        breaker.failed(now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == MOST_PAUSE_S


@given(st.floats(0, 1))
def test_a_pause_differs_by_chance_within_its_jitter(chance):
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0.0, chance)
    assert breaker.state(LEAST_PAUSE_S * (1 - JITTER) * 0.999) is State.OPEN
    assert breaker.state(LEAST_PAUSE_S * (1 + JITTER) * 1.001) is State.HALF_OPEN


@given(CALLS)
def test_whatever_happens_the_pause_is_over_within_the_longest_one(calls):
    breaker, now = Breaker(), 0.0
    for call, later in calls:
        now += later
        getattr(breaker, call)(now)
    assert breaker.state(now + MOST_PAUSE_S * (1 + JITTER)) is not State.OPEN
