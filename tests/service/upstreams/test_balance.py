"""Which Triton gets the next call, and which gets none for a while."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.upstreams.balance import (
    EJECTION_S,
    FORGET_S,
    FORGIVEN_S,
    LEAST_CALLS,
    LEAST_EXCESS_S,
    MOST_EJECTED,
    MOST_EJECTION_S,
    Balance,
    Load,
)

SIZES = st.integers(1, 6)


def group(size: int) -> Balance:
    return Balance([Load() for _ in range(size)])


def answer(balance: Balance, load: Load, seconds: float, now: float, times: int = 1) -> None:
    for _ in range(times):
        balance.measured(load, "see", seconds, now)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 50)), min_size=2, max_size=6), st.randoms())
def test_the_choice_is_usable_and_never_the_costliest_alone(told, chance):
    loads = [Load(in_flight=busy, _slowness=slow, _measured=0.0) for busy, slow in told]
    chosen = Balance(loads).choose(loads, 0.0, chance.randrange)
    assert chosen in loads
    costs = sorted(load.cost(0.0) for load in loads)
    assert chosen.cost(0.0) <= costs[-2] or costs[-1] == costs[-2]


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(range(3), 2)))
def test_every_pair_can_be_drawn_and_its_cheaper_one_is_chosen(one, other):
    loads = [Load(in_flight=busy) for busy in (5, 3, 1)]
    draws = {3: one, 2: other - (other > one)}  # the second one is drawn from those that are left
    assert Balance(loads).choose(loads, 0.0, draws.__getitem__) is loads[max(one, other)]


def test_calls_even_out():
    balance, chance = group(4), random.Random(7)
    for _ in range(400):
        balance.choose(balance.loads, 0.0, chance.randrange).in_flight += 1
    assert max(load.in_flight for load in balance.loads) - min(load.in_flight for load in balance.loads) <= 4


def test_of_two_the_slow_one_gets_fewer_calls():
    balance = group(2)
    slow, fast = balance.loads
    answer(balance, fast, 0.01, 0.0, 20)
    answer(balance, slow, 0.025, 0.0, 20)
    fast.in_flight, slow.in_flight = 1, 0
    assert balance.choose(balance.loads, 0.0, random.randrange) is fast
    fast.in_flight = 5
    assert balance.choose(balance.loads, 0.0, random.randrange) is slow


@pytest.mark.parametrize(("in_flight", "slowness", "cost"), [(0, 1.0, 1.0), (1, 2.5, 5.0), (2, 0.5, 3.0)])
def test_a_triton_costs_its_calls_with_the_next_one_times_its_slowness(in_flight, slowness, cost):
    assert Load(in_flight=in_flight, _slowness=slowness, _measured=0.0).cost(0.0) == cost


def test_a_slow_one_is_ejected_and_comes_back_with_a_clean_sheet():
    balance = group(2)
    slow, fast = balance.loads
    answer(balance, fast, 0.01, 0.0, 20)
    answer(balance, slow, 0.4, 0.0, LEAST_CALLS)
    assert slow.is_ejected(0.0)
    assert not fast.is_ejected(0.0)
    slow.in_flight, fast.in_flight = 0, 9
    assert balance.choose(balance.loads, 0.0, random.randrange) is fast
    assert balance.choose([slow], 0.0, random.randrange) is slow  # better than none
    assert not slow.is_ejected(EJECTION_S)
    assert slow.slowness(EJECTION_S) == 1
    answer(balance, slow, 0.4, EJECTION_S, LEAST_CALLS)
    assert slow.is_ejected(2.9 * EJECTION_S)


def test_each_ejection_is_longer_until_the_last_one_is_long_ago():
    balance = group(2)
    slow, fast = balance.loads

    def ejection(now: float) -> float:
        answer(balance, fast, 0.01, now, 20)
        answer(balance, slow, 0.4, now, LEAST_CALLS)
        return slow.ejected_until - now

    assert [ejection(now) for now in (0.0, 10.0, 30.0)] == [EJECTION_S, 2 * EJECTION_S, 3 * EJECTION_S]
    assert ejection(45.0 + FORGIVEN_S) == 4 * EJECTION_S
    assert ejection(66.0 + 2 * FORGIVEN_S) == EJECTION_S


def test_no_ejection_is_longer_than_the_longest():
    load, now, spans = Load(), 0.0, []
    for _ in range(20):
        load.eject(now)
        spans.append(load.ejected_until - now)
        now = load.ejected_until
    assert spans == sorted(spans)
    assert spans[-1] == MOST_EJECTION_S


@pytest.mark.parametrize(("others", "is_ejected"), [((1, 5, 5), False), ((1, 1, 5), True), ((5, 5, 1), False)])
def test_one_is_slow_by_what_is_usual_of_the_others_and_not_by_the_fastest(others, is_ejected):
    slow = Load(calls=LEAST_CALLS, _slowness=6.0, _measured=0.0)
    balance = Balance([slow, *(Load(_slowness=each, _measured=0.0) for each in others)], {"see": 0.1})
    balance.measured(slow, "see", 0.6, 0.0)
    assert slow.is_ejected(0.0) == is_ejected


@pytest.mark.parametrize("seconds", [10.0, 0.00001])
def test_what_an_ejected_triton_still_answers_is_typical_of_nothing(seconds):
    """It began before, or all that may be asked are ejected."""
    balance = group(2)
    slow, fast = balance.loads
    answer(balance, fast, 0.01, 0.0, 20)
    answer(balance, slow, 0.4, 0.0, LEAST_CALLS)
    answer(balance, slow, seconds, 1.0, 500)
    answer(balance, fast, 0.01, EJECTION_S, 20)
    assert fast.slowness(EJECTION_S) == pytest.approx(1, abs=0.1)
    answer(balance, slow, 0.4, EJECTION_S, 20)
    assert slow.is_ejected(EJECTION_S)


def test_an_ejection_counts_a_tritons_calls_anew():
    balance = group(2)
    slow, fast = balance.loads
    answer(balance, fast, 0.01, 0.0, 20)
    answer(balance, slow, 0.4, 0.0, LEAST_CALLS)
    assert slow.is_ejected(0.0)
    answer(balance, slow, 0.4, EJECTION_S, LEAST_CALLS - 1)
    assert not slow.is_ejected(EJECTION_S)
    answer(balance, slow, 0.4, EJECTION_S)
    assert slow.is_ejected(EJECTION_S)


def test_what_an_ejected_triton_still_answers_ejects_it_for_no_longer():
    balance = group(4)
    slow, *others = balance.loads
    for load in others:
        answer(balance, load, 0.01, 0.0, 20)
    answer(balance, slow, 0.4, 0.0, LEAST_CALLS)
    until = slow.ejected_until
    answer(balance, slow, 0.4, 1.0, 2 * LEAST_CALLS)
    assert (slow.ejected_until, slow.ejections) == (until, 1)


def test_no_more_are_ejected_than_the_share():
    balance = group(3)
    first, second, fast = balance.loads
    answer(balance, fast, 0.01, 0.0, 20)
    answer(balance, first, 0.4, 0.0, LEAST_CALLS)
    answer(balance, second, 0.4, 0.0, 20)
    assert [load.is_ejected(0.0) for load in balance.loads] == [True, False, False]


def test_the_only_triton_is_not_ejected():
    balance = group(1)
    answer(balance, balance.loads[0], 0.01, 0.0, 20)
    answer(balance, balance.loads[0], 0.4, 0.0, 20)
    assert not balance.loads[0].is_ejected(0.0)


def test_few_slow_calls_eject_nobody():
    balance = group(2)
    answer(balance, balance.loads[1], 0.01, 0.0, 20)
    answer(balance, balance.loads[0], 0.4, 0.0, LEAST_CALLS - 1)
    assert not any(load.is_ejected(0.0) for load in balance.loads)


def test_quick_calls_eject_nobody_whatever_their_ratio():
    balance = group(2)
    answer(balance, balance.loads[1], 0.0001, 0.0, 20)
    answer(balance, balance.loads[0], 0.004, 0.0, 20)
    assert not any(load.is_ejected(0.0) for load in balance.loads)


def test_a_call_that_is_slower_by_little_ejects_nobody():
    balance = group(2)
    answer(balance, balance.loads[1], 0.001, 0.0, 20)
    answer(balance, balance.loads[0], 0.99 * LEAST_EXCESS_S, 0.0, LEAST_CALLS)
    assert not any(load.is_ejected(0.0) for load in balance.loads)


def test_kinds_of_calls_are_measured_apart():
    balance = group(2)
    one, other = balance.loads
    for _ in range(30):
        balance.measured(one, "encode 4", 0.05, 0.0)
        balance.measured(other, "attend", 0.001, 0.0)
    assert one.slowness(0.0) == pytest.approx(1)
    assert not one.is_ejected(0.0)


def test_slowness_is_forgotten_without_calls():
    load = Load(_slowness=3.0, _measured=0.0)
    assert load.slowness(0.0) == 3
    assert load.slowness(FORGET_S) == pytest.approx(1 + 2 / math.e)
    assert load.slowness(20 * FORGET_S) == pytest.approx(1)


@given(
    SIZES,
    st.lists(st.tuples(st.integers(0, 5), st.floats(0.001, 5), st.floats(0, 4)), min_size=1, max_size=200),
)
def test_at_most_a_share_is_ejected_at_once(size, steps):
    balance, now = group(size), 0.0
    for who, seconds, later in steps:
        now += later
        answer(balance, balance.loads[who % size], seconds, now)
        assert sum(load.is_ejected(now) for load in balance.loads) <= MOST_EJECTED * size
