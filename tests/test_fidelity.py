"""The controller of elastic fidelity, on a queue and a clock of our own."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import Budget
from service.fidelity import LEAST_HOLD_S, LEVELS, MOST_HOLD_S, STEP_S, Fidelity

TARGET_S = 1.0
SERVERS = 8
SERVICE_S = (1.0, 0.8, 0.64, 0.5, 0.4)  # of one request, by level: they bear loads of 1, 1.25, 1.56, 2 and 2.5
PATIENCE_S = 10.0  # whoever waits longer goes


@dataclass
class Run:
    """What came of a load."""

    changes: list[tuple[float, int]] = field(default_factory=list)  # when, to which level
    waits: list[tuple[float, float]] = field(default_factory=list)  # when it ended, how long it was
    gone: int = 0  # without service

    def level_at(self, now: float) -> int:
        return next((level for at, level in reversed(self.changes) if at <= now), 0)

    def median_wait_s(self, start: float) -> float:
        return statistics.median(wait for at, wait in self.waits if at >= start)

    def share_at(self, levels: set[int], start: float, end: float) -> float:
        seconds = range(round(start), round(end))
        return sum(self.level_at(second) in levels for second in seconds) / len(seconds)


class Queue:
    """First come, first served, by SERVERS at once."""

    def __init__(self, seed: int, target_s: float = TARGET_S) -> None:
        self.fidelity = Fidelity(target_s, 0.0)
        self.run = Run()
        self.random = random.Random(seed)
        self.waiting: deque[float] = deque()  # when they came
        self.ends: list[float] = []

    def happen(self, now: float) -> None:
        while self.waiting and now - self.waiting[0] > PATIENCE_S:
            self.waiting.popleft()
            self.run.gone += 1
        while self.waiting and len(self.ends) < SERVERS:
            self.run.waits.append((now, now - self.waiting.popleft()))
            heapq.heappush(self.ends, now + SERVICE_S[self.fidelity.level] * self.random.uniform(0.7, 1.3))
        before = self.fidelity.level
        level = self.fidelity.observe(now, self.waiting[0] if self.waiting else None)
        if level != before:
            self.run.changes.append((now, level))

    def bear(self, load: Callable[[float], float], until: float) -> Run:
        """Poisson arrivals; a load of 1 is all that level 0 can bear."""
        now = 0.0
        while now < until:
            now += self.random.expovariate(load(now) * SERVERS / SERVICE_S[0])
            while self.ends and self.ends[0] <= now:
                end = heapq.heappop(self.ends)
                self.happen(end)
            self.waiting.append(now)
            self.happen(now)
        return self.run


def step(high: float, end: float = math.inf) -> Callable[[float], float]:
    return lambda now: high if now < end else 0.3


SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_load_that_can_be_borne_is_looked_at_as_closely_as_asked(load, seed):
    assert Queue(seed).bear(step(load), 300).changes == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("load", "needed"), [(1.15, 1), (1.4, 2), (1.8, 3), (2.3, 4)])
def test_a_step_settles_at_the_level_that_bears_it(load, needed, seed):
    run = Queue(seed).bear(step(load), 400)
    assert run.share_at({needed, needed + 1}, 100, 400) > 0.8
    assert sum(at > 100 for at, _ in run.changes) <= 300 / MOST_HOLD_S * 3
    assert run.median_wait_s(100) < TARGET_S
    assert run.gone < 0.01 * len(run.waits)
    without = Queue(seed, math.inf).bear(step(load), 400)
    assert without.changes == []
    assert without.gone > 20 * run.gone + 100


@pytest.mark.parametrize("seed", SEEDS)
def test_more_than_any_level_bears_goes_to_the_last_at_once_and_stays(seed):
    run = Queue(seed).bear(step(4.0), 120)
    assert [level for _, level in run.changes] == [1, 2, 3, 4]
    assert run.changes[-1][0] < 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [1.4, 2.3, 4.0])
def test_once_the_load_has_gone_everything_is_looked_at_closely_again(load, seed):
    run = Queue(seed).bear(step(load, end=120), 120 + 5 * MOST_HOLD_S)
    assert run.changes[-1][1] == 0
    after = [level for at, level in run.changes if at > 135]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ramp_is_followed_up_and_down(seed):
    run = Queue(seed).bear(lambda now: 0.4 + 1.8 * max(0.0, 1 - abs(now - 300) / 300), 700)
    assert max(run.level_at(second) for second in range(260, 330)) >= 3
    assert run.gone < 0.01 * len(run.waits)
    assert run.changes[-1][1] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spike_is_over_soon(seed):
    run = Queue(seed).bear(lambda now: 4.0 if 50 < now < 53 else 0.5, 120)
    levels = [0, *(level for _, level in run.changes), 0]
    top = levels.index(max(levels))
    assert levels[:top] == sorted(levels[:top])
    assert levels[top:] == sorted(levels[top:], reverse=True)
    assert run.level_at(53 + 10 + len(LEVELS) * LEAST_HOLD_S) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_burst_that_is_gone_within_the_target_changes_nothing(seed):
    run = Queue(seed).bear(lambda now: 4.0 if now % 30 < 0.3 else 0.4, 300)
    assert run.changes == []


moments = st.lists(
    st.tuples(st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0, 4.0, 100.0]), st.none() | st.floats(0, 20)),
    max_size=80,
)


@given(moments)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_there_is_one_change_a_second_at_most_and_one_level_up_at_a_time(moments):
    fidelity, again, now = Fidelity(TARGET_S, 0.0), Fidelity(TARGET_S, 0.0), 0.0
    changes = [(-math.inf, 0)]
    for gap, wait_s in moments:
        now += gap
        since = None if wait_s is None else now - wait_s
        level = fidelity.observe(now, since)
        assert level == fidelity.level == again.observe(now, since)
        if level != changes[-1][1]:
            changes.append((now, level))
    for (before, low), (at, high) in itertools.pairwise(changes):
        assert at - before >= STEP_S - 1e-9
        assert 0 <= high <= min(low + 1, len(LEVELS) - 1)
    fidelity.observe(now, None)
    assert fidelity.observe(now + len(LEVELS) * MOST_HOLD_S, None) == 0


@given(moments)
def test_switched_off_it_never_leaves_level_0(moments):
    fidelity, now = Fidelity(math.inf, 0.0), 0.0
    for gap, wait_s in moments:
        now += gap
        assert fidelity.observe(now, None if wait_s is None else now - wait_s) == 0


ranges = st.tuples(st.integers(1, 400), st.integers(1, 400)).map(lambda pair: (min(pair), max(pair)))


@given(ranges, ranges)
def test_a_level_takes_from_the_most_and_never_passes_the_least(vision_tokens, visual_tokens):
    asked = before = Budget(vision_tokens, visual_tokens)
    for level in LEVELS:
        budget = level.cap(asked)
        for name in ("vision_tokens", "visual_tokens"):
            least, most = getattr(budget, name)
            assert least == getattr(asked, name)[0]
            assert least <= most <= getattr(before, name)[1]
            assert most <= max(least, getattr(level, name))
        before = budget


def test_the_levels_are_what_the_design_says():
    assert [level.visual_tokens for level in LEVELS] == [128, 96, 64, 32, 32]
    assert [level.vision_tokens for level in LEVELS] == [400, 192, 128, 96, 64]
    assert [level.closer_view for level in LEVELS] == [True, True, False, False, False]


def test_who_asks_for_one_number_gets_it_at_every_level():
    exact = Budget(vision_tokens=(256, 256), visual_tokens=(128, 128))
    assert all(level.cap(exact) == exact for level in LEVELS)
