"""The controller of elastic fidelity, on a queue, on a machine that all share, and on a clock of our own."""

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

from service.admission.contention import Contention
from service.admission.fidelity import LEAST_HOLD_S, LEVELS, MOST_HOLD_S, STEP_S, TRIAL_S, Fidelity
from service.core.request import Budget

TARGET_S = 1.0
SERVERS = 8
SERVICE_S = (1.0, 0.8, 0.64, 0.5, 0.4)  # of one request, by level: they bear loads of 1, 1.25, 1.56, 2 and 2.5
PATIENCE_S = 10.0  # whoever waits longer goes
ALLOWED_S = 5.0  # from an arrival to its deadline, where all are worked on at once
WORK_S = 0.25  # of one request there, at level 0 and alone


@dataclass
class Run:
    """What came of a load."""

    changes: list[tuple[float, int]] = field(default_factory=list)  # when, to which level
    waits: list[tuple[float, float]] = field(default_factory=list)  # when it ended, how long it was
    gone: int = 0  # without service
    ends: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether in time

    def level_at(self, now: float) -> int:
        return next((level for at, level in reversed(self.changes) if at <= now), 0)

    def missed(self, start: float) -> float:
        """Share of those that ended from then on."""
        return statistics.mean(not in_time for at, in_time in self.ends if at >= start)

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


@dataclass(eq=False)
class Job:
    """One request that is worked on."""

    deadline: float
    left_s: float  # of work, were it alone


class SharedMachine:
    """All that come are worked on at once, each with the same share of the machine: nobody waits in a queue."""

    def __init__(self, seed: int, allowed_s: float = ALLOWED_S) -> None:
        self.fidelity = Fidelity(TARGET_S, 0.0)
        self.contention = Contention(TARGET_S, 0.0)
        self.allowed_s = allowed_s
        self.run = Run()
        self.random = random.Random(seed)
        self.jobs: list[Job] = []
        self.now = 0.0

    def observe(self) -> None:
        before = self.fidelity.level
        level = self.fidelity.observe(self.now, self.contention.waiting_since(self.now))
        if level != before:
            self.run.changes.append((self.now, level))

    def work(self, until: float) -> None:
        while self.jobs:
            first = min(self.jobs, key=lambda job: job.left_s)
            next_to_miss = min(self.jobs, key=lambda job: job.deadline)
            end = self.now + first.left_s * len(self.jobs)
            in_time = end <= next_to_miss.deadline
            over = first if in_time else next_to_miss
            self._pass_time(min(end, next_to_miss.deadline, until))
            if self.now == until:
                return
            self.jobs.remove(over)
            self.contention.end(over, self.now, answered=in_time)
            self.run.ends.append((self.now, in_time))
            self.observe()
        self.now = until

    def _pass_time(self, until: float) -> None:
        for job in self.jobs:
            job.left_s -= (until - self.now) / len(self.jobs)
        self.now = until

    def come(self, work_s: float) -> None:
        """A request of so much work at level 0."""
        job = Job(self.now + self.allowed_s, work_s * SERVICE_S[self.fidelity.level])
        self.jobs.append(job)
        self.contention.start(job, self.now, self.allowed_s)
        self.observe()

    def bear(self, load: Callable[[float], float], until: float) -> Run:
        """Poisson arrivals; a load of 1 is all that level 0 can bear."""
        now = 0.0
        while now < until:
            now += self.random.expovariate(load(now) / WORK_S)
            self.work(now)
            self.come(WORK_S * self.random.uniform(0.7, 1.3))
        return self.run


class Nobody(Contention):
    """Waits for others: what a controller sees that watches queues only."""

    def waiting_since(self, now: float) -> None:
        return None


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_load_that_all_can_share_is_looked_at_as_closely_as_asked(load, seed):
    assert SharedMachine(seed).bear(step(load), 300).changes == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("load", "needed"), [(1.15, 1), (1.4, 2), (1.8, 3), (2.3, 4)])
def test_where_nobody_waits_for_a_turn_it_settles_at_a_level_where_answers_come_in_time(load, needed, seed):
    run = SharedMachine(seed).bear(step(load), 400)
    assert run.missed(60) < 0.06
    assert run.share_at(set(range(needed, len(LEVELS))), 60, 400) > 0.8
    assert sum(at > 100 for at, _ in run.changes) <= 300 / MOST_HOLD_S * 4
    of_queues_only = SharedMachine(seed)
    of_queues_only.contention = Nobody(TARGET_S, 0.0)
    without = of_queues_only.bear(step(load), 400)
    assert without.changes == []
    assert without.missed(60) > 5 * run.missed(60) + 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_more_than_all_can_share_goes_to_the_last_level_at_once_and_stays(seed):
    run = SharedMachine(seed).bear(step(4.0), 120)
    assert [level for _, level in run.changes] == [1, 2, 3, 4]
    assert run.changes[-1][0] < 15


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", [1.4, 2.3, 4.0])
def test_once_fewer_share_the_machine_everything_is_looked_at_closely_again(load, seed):
    run = SharedMachine(seed).bear(step(load, end=120), 120 + 5 * MOST_HOLD_S)
    assert run.changes[-1][1] == 0
    after = [level for at, level in run.changes if at > 135]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ramp_of_those_who_share_is_followed_up_and_down(seed):
    run = SharedMachine(seed).bear(lambda now: 0.4 + 1.8 * max(0.0, 1 - abs(now - 300) / 300), 700)
    assert max(run.level_at(second) for second in range(260, 330)) >= 3
    assert run.missed(0) < 0.03
    assert run.changes[-1][1] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spike_of_those_who_share_is_over_soon(seed):
    run = SharedMachine(seed).bear(lambda now: 4.0 if 50 < now < 53 else 0.5, 120)
    levels = [0, *(level for _, level in run.changes), 0]
    top = levels.index(max(levels))
    assert levels[:top] == sorted(levels[:top])
    assert levels[top:] == sorted(levels[top:], reverse=True)
    assert run.level_at(53 + 10 + len(LEVELS) * LEAST_HOLD_S) == 0


def test_long_answers_that_come_alone_are_no_load():
    machine = SharedMachine(0)
    for second in range(0, 100, 10):
        machine.work(float(second))
        machine.come(0.99 * ALLOWED_S)
        for moment in range(1, 9):  # somebody asks for the level
            machine.work(second + moment)
            machine.observe()
    assert machine.run.changes == []
    assert all(in_time for _, in_time in machine.run.ends)


def test_a_long_answer_beside_a_trickle_of_short_ones_is_no_load():
    machine = SharedMachine(0, allowed_s=30.0)
    for second in range(300):
        machine.work(float(second))
        machine.come(0.4)
        if second % 40 == 0:
            machine.come(12.0)
    assert machine.run.changes == []


def test_who_gives_itself_hardly_any_time_takes_no_detail_from_others():
    machine = SharedMachine(0, allowed_s=0.9 * TARGET_S)
    for moment in range(1000):
        machine.work(0.05 * moment)
        machine.come(2.0)
    assert machine.run.missed(0) == 1
    assert machine.run.changes == []


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


def test_a_queue_that_shrinks_fast_enough_takes_no_more_detail():
    fidelity = Fidelity(TARGET_S, 0.0)
    for tenth in range(41):  # the same request has waited since 0
        fidelity.observe(tenth / 10, 0.0)
    shrinking = []
    for tenth in range(1, 31):
        now, wait_s = 4 + tenth / 10, 4 - 0.08 * tenth  # at the target in less than SOON_S
        shrinking.append(fidelity.observe(now, now - wait_s))
    assert shrinking[10:] == [shrinking[10]] * 20  # the first second is still judged by how it grew
    assert 0 < shrinking[-1] < len(LEVELS) - 1
    for tenth in range(1, 31):  # and no longer
        now = 7 + tenth / 10
        fidelity.observe(now, now - 3.0)
    assert fidelity.level > shrinking[-1]


def raised(fidelity: Fidelity, now: float) -> float:
    """The moment at which the level has gone up by one, since a request waits."""
    before, came = fidelity.level, now
    while fidelity.level == before:
        now += 0.1
        assert now < came + 100
        fidelity.observe(now, came)
    fidelity.observe(now, None)
    return now


def lowered(fidelity: Fidelity, now: float) -> float:
    """The moment at which the level has gone down by one, while no request waits."""
    before, end = fidelity.level, now + 100
    while fidelity.level == before:
        now += 0.1
        assert now < end
        fidelity.observe(now, None)
    return now


def test_a_failed_trial_makes_the_next_wait_longer_and_a_success_makes_it_as_short_as_at_first():
    fidelity = Fidelity(TARGET_S, 0.0)
    up = raised(fidelity, 0.0)
    trial = lowered(fidelity, up)
    assert trial - up == pytest.approx(LEAST_HOLD_S, abs=0.2)
    up = raised(fidelity, trial)  # soon: the trial has failed
    trial = lowered(fidelity, up)
    assert trial - up == pytest.approx(4 * LEAST_HOLD_S, abs=0.2)
    up = raised(fidelity, trial + TRIAL_S)  # late: this one has succeeded
    trial = lowered(fidelity, up)
    assert trial - up == pytest.approx(LEAST_HOLD_S, abs=0.2)


@pytest.mark.parametrize("start", [0.0, 1000.0])
def test_a_failed_trial_holds_up_its_level_and_no_higher_one(start):
    fidelity = Fidelity(TARGET_S, start)
    trial = lowered(fidelity, raised(fidelity, start))
    up = raised(fidelity, raised(fidelity, trial))  # soon: the trial of level 0 has failed
    again = lowered(fidelity, up)
    assert (again - up, fidelity.level) == (pytest.approx(LEAST_HOLD_S, abs=0.2), 1)
    assert lowered(fidelity, again) - again == pytest.approx(4 * LEAST_HOLD_S, abs=0.2)


def test_two_lowerings_are_told_a_second_apart_however_rarely_somebody_looks():
    fidelity = Fidelity(TARGET_S, 0.0)
    calm = raised(fidelity, raised(fidelity, 0.0))
    assert fidelity.observe(calm + 2 * LEAST_HOLD_S - 0.1, None) == 1  # due for LEAST_HOLD_S
    assert fidelity.observe(calm + 2 * LEAST_HOLD_S + 0.1, None) == 1
    assert fidelity.observe(calm + 2 * LEAST_HOLD_S + STEP_S, None) == 0


LONG_S = 2.0  # a target that is no power of itself: its product and its quotient with a share differ


def at_level_1(target_s: float) -> tuple[Fidelity, float]:
    """A controller that has just risen, and when."""
    fidelity, now = Fidelity(target_s, 0.0), 0.0
    while not fidelity.observe(now, now - 2 * target_s):
        now += 0.1
        assert now < 100
    return fidelity, now


@pytest.mark.parametrize(("target_s", "risen_s"), [(1.0, 1.0 + math.sqrt(2.0)), (2.0, 4.0), (0.5, 1.5)])
def test_the_level_rises_when_the_weighted_excess_is_a_second(target_s: float, risen_s: float) -> None:
    """Of a wait that grows from 0 to w, it is the integral of x / target - 1 from the target to w."""
    fidelity = Fidelity(target_s, 0.0)
    risen = next(hundredth / 100 for hundredth in range(1000) if fidelity.observe(hundredth / 100, 0.0))
    assert risen == pytest.approx(risen_s, abs=0.02)


def test_a_long_wait_counts_from_the_first_look_and_needs_no_earlier_change() -> None:
    fidelity = Fidelity(TARGET_S, 0.0)
    assert fidelity.observe(0.0, -TARGET_S) == 0
    assert fidelity.observe(1.0, -TARGET_S) == 0  # half a second of excess
    fidelity = Fidelity(TARGET_S, 0.0)
    assert fidelity.observe(0.0, -10.0) == 0
    assert fidelity.observe(0.5, -10.0) == 1


@pytest.mark.parametrize(("wait_s", "level"), [(0.45, 0), (0.55, 1)])  # a quarter of LONG_S is calm
def test_waits_are_calm_up_to_a_quarter_of_the_target(wait_s: float, level: int) -> None:
    fidelity, risen = at_level_1(LONG_S)
    for step in range(1, round(100 * LEAST_HOLD_S)):
        now = risen + step / 50
        fidelity.observe(now, now - wait_s)
    assert fidelity.level == level


@pytest.mark.parametrize(("came_s", "level"), [(LEAST_HOLD_S - 1.5, 1), (LEAST_HOLD_S - 0.2, 0)])
def test_calm_ends_when_a_wait_grows_long_however_late_that_is_seen(came_s: float, level: int) -> None:
    """The request came that long after the calm began. Its wait is not calm half a second later."""
    fidelity, risen = at_level_1(LONG_S)
    fidelity.observe(risen, None)
    fidelity.observe(risen + came_s, risen + came_s)
    assert fidelity.observe(risen + came_s + 1.9, None) == level


def waits(fidelity: Fidelity, start: float, seconds: float, first_s: float, last_s: float) -> int:
    """Let the longest wait go from one to the other -> the level then."""
    for step in range(1, 101):
        now = start + seconds * step / 100
        fidelity.observe(now, now - (first_s + (last_s - first_s) * step / 100))
    return fidelity.level


def test_a_queue_that_shrinks_slowly_is_looked_at_less_closely_again() -> None:
    fidelity, risen = at_level_1(TARGET_S)
    assert waits(fidelity, risen, 8.0, 1.30, 1.29) == 2
    assert waits(fidelity, risen + 8.0, 5.0, 1.29, 1.24) > 2


def test_a_queue_that_soon_reaches_the_target_is_let_be() -> None:
    fidelity, risen = at_level_1(TARGET_S)
    assert waits(fidelity, risen, 1.2, 2.0, 1.55) == 1
