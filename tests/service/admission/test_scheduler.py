"""Who enters when, with a clock of our own. Times are whole milliseconds, so that a failure is easy to read."""

from __future__ import annotations

import gc
import heapq
import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench.orders import Fifo
from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.scheduler import HANDICAP_S, LOW_PRIORITY_S, PATIENCE_S, Claim, Kind, Resource, Scheduler
from service.core.request import Priority

VISION_SLOTS, LLM_TOKENS = 3, 100
FAR = 1e9


def claim(kind: Kind = Kind.FOLLOW_UP, amount: int = 10, arrived: float = 0.0, **more: object) -> Claim:
    fields = {"resource": Resource.LLM, "deadline": FAR} | more
    return Claim(amount=amount, kind=kind, arrived=arrived, **fields)


def slot(arrived: float = 0.0, **more: object) -> Claim:
    return claim(Kind.SINGLE_IMAGE, 1, arrived, resource=Resource.VISION, **more)


class House:
    """A scheduler and what a caller of it knows."""

    def __init__(
        self, vision_slots: int = VISION_SLOTS, llm_tokens: int = LLM_TOKENS, scheduling: type[Scheduler] = Scheduler
    ) -> None:
        self.scheduler = scheduling(vision_slots, llm_tokens)
        self.limits = {Resource.VISION: vision_slots, Resource.LLM: llm_tokens}
        self.waiting: list[Claim] = []
        self.running: list[Claim] = []
        self.log: list[tuple[float, int]] = []  # when, and which claim in order of submission
        self.numbers: dict[Claim, int] = {}

    def submit(self, one: Claim, now: float) -> bool:
        refusal = self.scheduler.submit(one, now)
        if refusal is None:
            self.numbers[one] = len(self.numbers)
            self.waiting.append(one)
        return refusal is None

    def schedule(self, now: float) -> list[Claim]:
        granted, expired = self.scheduler.schedule(now)
        for one in granted:
            self.waiting.remove(one)
            self.running.append(one)
            self.log.append((now, self.numbers[one]))
        for one in expired:
            self.waiting.remove(one)
        return granted

    def release(self, one: Claim, now: float, finished: bool = True) -> None:
        (self.running if one in self.running else self.waiting).remove(one)
        self.scheduler.release(one, now, finished=finished)

    def check(self, now: float) -> None:
        """Never over a resource; nothing that fits waits, but behind somebody out of patience."""
        for resource, limit in self.limits.items():
            used = sum(one.amount for one in self.running if one.resource is resource)
            assert used == self.scheduler.used(resource) <= limit
            waiting = [one for one in self.waiting if one.resource is resource]
            large = [one for one in waiting if one.amount > limit - used]
            patient = all(now - (one.arrived + one.handicap_s) < PATIENCE_S for one in large)
            assert not patient or all(one.amount > limit - used for one in waiting)
        for kind in Kind:
            assert self.scheduler.waiting(kind) == sum(one.kind is kind for one in self.waiting)
            assert self.scheduler.running(kind) == sum(one.kind is kind for one in self.running)
        urgent = [one.arrived for one in self.waiting if one.priority is Priority.NORMAL]
        assert self.scheduler.waiting_since(now) == min(urgent, default=None)


def drawn_claim(draw: st.DrawFn, now: float) -> Claim:
    kind = draw(st.sampled_from(Kind))
    resource = draw(st.sampled_from(Resource))
    most = VISION_SLOTS if resource is Resource.VISION else LLM_TOKENS
    return claim(
        kind,
        draw(st.integers(1, most)),
        now - draw(st.sampled_from([0.0, 0.1, 3.0])),
        resource=resource,
        tenant=draw(st.sampled_from(["", "a", "b"])),
        priority=draw(st.sampled_from(Priority)),
        deadline=now + draw(st.sampled_from([0.5, 5.0, FAR])),
    )


@st.composite
def a_day(draw: st.DrawFn) -> list[tuple[float, str, object]]:
    """Events in order: a claim comes, somebody who runs or waits goes for one reason or another, time passes."""
    now, events = 0.0, []
    for _ in range(draw(st.integers(1, 60))):
        now = round(now + draw(st.sampled_from([0.0, 0.001, 0.1, 1.0, 3.0])), 3)
        what = draw(st.sampled_from(["come", "come", "end", "fail", "cancel"]))
        events.append((now, what, drawn_claim(draw, now) if what == "come" else draw(st.integers(0, 1000))))
    return events


def play(events: list[tuple[float, str, object]]) -> House:
    house = House()
    for now, what, subject in events:
        if what == "come":
            fresh = claim(**{name: getattr(subject, name) for name in ("kind", "amount", "arrived", "resource")},
                          tenant=subject.tenant, priority=subject.priority, deadline=subject.deadline)  # fmt: skip
            house.submit(fresh, now)
        else:
            some = house.waiting if what == "cancel" and house.waiting else house.running
            if some:
                house.release(some[subject % len(some)], now, finished=what == "end")
        house.schedule(now)
        house.check(now)
    return house


@pytest.mark.slow
@given(a_day())
@settings(max_examples=150, deadline=None)
def test_resources_are_never_passed_and_never_left_idle(events):
    house = play(events)
    now = events[-1][0]
    for one in [*house.running, *house.waiting]:
        house.release(one, now)
        house.scheduler.release(one, now)  # once more: nothing happens
    assert house.scheduler.schedule(now) == ([], [])
    assert [house.scheduler.used(resource) for resource in Resource] == [0, 0]


@given(a_day())
@settings(max_examples=50, deadline=None)
def test_the_same_day_goes_the_same_way(events):
    assert play(events).log == play(events).log


LONGEST_S = 0.1
arrivals = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.4]),  # since the one before
        st.sampled_from(Kind),
        st.integers(1, LLM_TOKENS),
        st.sampled_from(["", "a", "b"]),
        st.sampled_from([0.01, LONGEST_S]),  # for how long it is held
        st.sampled_from(Priority),
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.slow
@given(arrivals, st.integers(0, 19), st.integers(1, 20), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_nobody_starves_and_the_bound_of_the_docstring_holds(arrivals, watched, small, tenants):
    """However many cheap, small claims of whatever tenants come all the time, more of them than there is room for."""
    every, now = [], 2 * LONGEST_S
    for after_s, kind, amount, tenant, held_s, priority in arrivals:
        now += after_s
        every.append((claim(kind, amount, now, tenant=tenant, priority=priority), held_s))
    each_s = 0.9 * LONGEST_S * small / LLM_TOKENS
    one = every[watched % len(arrivals)][0]  # of the arrivals, not of the stream
    put_back_s = PATIENCE_S + HANDICAP_S[one.kind] + (one.priority is Priority.LOW) * LOW_PRIORITY_S
    for step in range(int((now + put_back_s + PATIENCE_S + 10 * LONGEST_S) / each_s)):
        every.append((claim(Kind.FOLLOW_UP, small, step * each_s, tenant=f"new{step % tenants}"), LONGEST_S))
    started = dict(run(sorted(every, key=lambda pair: pair[0].arrived)))
    earlier = [at for other, at in started.items() if other.arrived < one.arrived + put_back_s and at <= started[one]]
    impatient = one.arrived + put_back_s + PATIENCE_S
    turns = [impatient, *sorted(at for at in earlier if at > impatient)]
    assert all(later - at <= 2 * LONGEST_S + 1e-6 for at, later in itertools.pairwise(turns))


def run(arrivals: list[tuple[Claim, float]]) -> list[tuple[Claim, float]]:
    """Every claim is held for its time; when each started."""
    house, coming, ends, starts = House(), deque(arrivals), [], []
    holds = dict(arrivals)
    while coming or ends:
        if ends and (not coming or min(ends)[0] <= coming[0][0].arrived):
            ends.sort(key=lambda end: end[0])
            now, _, one = ends.pop(0)
            house.release(one, now)
        else:
            one, _ = coming.popleft()
            now = one.arrived
            assert house.submit(one, now)
        for begun in house.schedule(now):
            starts.append((begun, now))
            ends.append((now + holds[begun], house.numbers[begun], begun))
    assert not house.waiting
    return starts


def test_the_cheaper_kind_goes_first_and_age_makes_up_for_it():
    house = House()
    house.submit(blocker := claim(amount=LLM_TOKENS), 0.0)
    house.schedule(0.0)
    image = claim(Kind.SINGLE_IMAGE, LLM_TOKENS, arrived=1.0)
    younger = claim(amount=LLM_TOKENS, arrived=1.0 + HANDICAP_S[Kind.SINGLE_IMAGE] - 0.01)
    late = claim(amount=LLM_TOKENS, arrived=1.0 + HANDICAP_S[Kind.SINGLE_IMAGE] + 0.01)
    for one in (image, late, younger):
        house.submit(one, 2.0)
    order = [blocker]
    for _ in range(3):
        house.release(order[-1], 3.0)
        order += house.schedule(3.0)
    assert order[1:] == [younger, image, late]


def test_low_priority_waits_for_the_others_of_its_tenant_and_age_makes_up_for_it():
    house = House()
    house.submit(blocker := claim(amount=LLM_TOKENS), 0.0)
    house.schedule(0.0)
    low = claim(amount=LLM_TOKENS, arrived=1.0, priority=Priority.LOW)
    younger = claim(Kind.MULTI_IMAGE, LLM_TOKENS, arrived=9.9)
    late = claim(amount=LLM_TOKENS, arrived=11.1)
    for one in (low, late, younger):
        house.submit(one, 11.2)
    order = [blocker]
    for _ in range(3):
        house.release(order[-1], 12.0)
        order += house.schedule(12.0)
    assert order[1:] == [younger, low, late]


def test_low_priority_holds_nobody_up():
    house = House()
    house.submit(claim(amount=60), 0.0)
    house.submit(low := claim(amount=50, arrived=0.0, priority=Priority.LOW), 0.0)
    house.schedule(0.0)
    house.submit(small := claim(amount=30, arrived=5.0), 5.0)
    assert house.schedule(5.0) == [small]
    house.submit(large := claim(amount=40, arrived=5.1, tenant="b", priority=Priority.LOW), 5.1)
    assert house.schedule(8.0) == []
    house.submit(late := claim(amount=10, arrived=9.0), 9.0)
    assert house.schedule(9.0) == [late]  # b holds nothing, but its claim is not urgent
    assert house.waiting == [low, large]


def test_a_follow_up_starts_while_every_vision_slot_is_taken_and_wanted():
    house = House()
    for _ in range(VISION_SLOTS + 5):
        house.submit(slot(), 0.0)
    assert len(house.schedule(0.0)) == VISION_SLOTS
    house.submit(follow_up := claim(), 0.1)
    assert house.schedule(0.1) == [follow_up]


def test_what_does_not_fit_is_passed_until_it_is_out_of_patience():
    house = House()
    house.submit(first := claim(amount=60), 0.0)
    house.schedule(0.0)
    house.submit(large := claim(amount=90, arrived=0.1), 0.1)
    house.submit(small := claim(amount=30, arrived=0.2), 0.2)
    assert house.schedule(0.2) == [small]
    house.release(small, 0.1 + PATIENCE_S)
    house.submit(late := claim(amount=30, arrived=2.0), 0.1 + PATIENCE_S)
    assert house.schedule(0.1 + PATIENCE_S) == []
    house.release(first, 2.5)
    assert house.schedule(2.5) == [large]
    house.release(large, 2.6)
    assert house.schedule(2.6) == [late]


def test_a_flood_of_one_tenant_does_not_make_another_wait_for_all_of_it():
    house = House(llm_tokens=20)
    flood = [claim(arrived=0.0, tenant="flood") for _ in range(50)]
    for one in flood:
        house.submit(one, 0.0)
    assert house.schedule(0.0) == flood[:2]
    house.submit(other := claim(arrived=1.0, tenant="other"), 1.0)
    house.release(flood[0], 1.1)
    assert house.schedule(1.1) == [other]
    house.release(flood[1], 1.2)
    assert house.schedule(1.2) == [flood[2]]


def test_a_claim_that_cannot_end_in_time_is_dropped_before_it_starts():
    house = House(vision_slots=1)
    house.submit(first := slot(), 0.0)
    house.schedule(0.0)
    house.submit(slot(deadline=2.9), 0.1)
    house.submit(patient := slot(deadline=10.0), 0.2)
    house.release(first, 2.0)  # an encode takes 2 s
    assert house.schedule(2.0) == [patient]
    assert house.waiting == []


def test_claims_that_left_are_forgotten_though_another_waits_all_the_time():
    """What waits for its deadline must not keep every request of the meantime alive."""
    before, house = claims(), House(llm_tokens=10)
    house.submit(claim(amount=10), 0.0)
    house.schedule(0.0)
    house.submit(claim(amount=10), 0.0)
    for number in range(1, 1001):
        house.submit(claim(amount=10, arrived=number), number)  # one waits for the other
        house.release(house.running[0], number)
        house.schedule(number)
    assert len(house.waiting) + len(house.running) == 2
    house.numbers.clear()
    assert claims() - before < 20


def claims() -> int:
    gc.collect()
    return sum(isinstance(each, Claim) for each in gc.get_objects())


def test_who_waited_past_its_deadline_is_refused_by_name():
    house = House()
    house.submit(first := claim(amount=LLM_TOKENS), 0.0)
    house.schedule(0.0)
    house.submit(late := claim(deadline=2.0), 0.0)
    _, expired = house.scheduler.schedule(3.0)
    assert expired == [late]
    refusal = house.scheduler.expired(late)
    assert refusal.code == "deadline"
    assert refusal.message == (
        "the request waited in the queue until too little of timeout_s was left: raise timeout_s, or try again "
        "when the service is less busy"
    )
    assert late.over
    assert not first.over


def test_who_waited_past_its_deadline_is_told_how_long_the_others_wait():
    house = House(vision_slots=1)
    house.submit(first := slot(), 0.0)
    house.schedule(0.0)
    house.submit(late := slot(deadline=2.5), 0.0)
    for _ in range(2):
        house.submit(slot(), 0.0)
    house.release(first, 2.0)  # one in 2 s
    _, expired = house.scheduler.schedule(2.0)
    assert expired == [late]
    assert house.scheduler.expired(late).retry_after_s == pytest.approx(2.0)


def test_who_would_wait_past_its_deadline_is_refused_with_the_wait():
    house = House(vision_slots=1)
    queue = deque(slot(arrived=0.0) for _ in range(10))
    for one in queue:
        house.submit(one, 0.0)
    for second in range(1, 6):
        house.schedule(second - 1.0)
        house.release(queue.popleft(), float(second))
    house.schedule(5.0)  # one runs, four wait, one a second
    refusal = house.scheduler.submit(slot(arrived=5.0, deadline=8.0), 5.0)
    assert refusal.code == "deadline"
    assert refusal.retry_after_s == pytest.approx(4.0, rel=0.1)
    assert refusal.message == (
        f"the estimated queue time is {refusal.retry_after_s:.1f} s, which leaves too little of timeout_s for an "
        "answer: raise timeout_s, or try again when the service is less busy"
    )
    assert house.scheduler.submit(slot(arrived=5.0, deadline=15.0), 5.0) is None
    assert house.scheduler.submit(claim(arrived=5.0, deadline=5.5), 5.0) is None  # the LLM is free


def busy_llm() -> Scheduler:
    """The LLM is taken, one claim waits for it, and its tokens come free every five seconds."""
    scheduler = Scheduler(1, 10)
    first, *_ = claims = [claim(deadline=100.0, request=number) for number in range(3)]
    for each in claims:
        assert scheduler.submit(each, 0.0) is None
    scheduler.schedule(0.0)
    scheduler.release(first, 5.0)
    scheduler.schedule(5.0)
    return scheduler


@pytest.mark.parametrize(("deadline", "is_refused"), [(14.0, True), (16.0, False)])
def test_a_new_image_is_refused_if_the_llm_would_take_it_too_late(deadline, is_refused):
    refusal = busy_llm().submit(slot(arrived=5.0, deadline=deadline, request="new"), 5.0)
    assert (refusal is not None) == is_refused
    if refusal is not None:
        assert refusal.retry_after_s == pytest.approx(5.0, rel=0.1)
        assert refusal.message.startswith(f"the estimated queue time is {refusal.retry_after_s:.1f} s, which leaves")


@pytest.mark.parametrize("is_in_service", [True, False])
def test_a_request_whose_image_is_seen_is_not_refused_for_the_llms_queue(is_in_service):
    scheduler = busy_llm()
    if is_in_service:
        scheduler.limit.contention.start("late", 5.0, 9.0)
    refusal = scheduler.submit(claim(arrived=5.0, deadline=9.0, request="late"), 5.0)
    assert (refusal is None) == is_in_service


def in_line(number: int, resource: Resource = Resource.LLM, amount: int = LLM_TOKENS, **more: object) -> Claim:
    """Of the request that came at second `number`."""
    came = float(number)
    return claim(amount=amount, arrived=came, resource=resource, request=number, request_arrived=came, **more)


class Line(House):
    """Requests in one queue: their images, then the LLM."""

    def __init__(self) -> None:
        super().__init__(scheduling=Fifo)
        self.begun: dict[int, None] = {}  # requests in order of their first start

    def schedule(self, now: float) -> list[Claim]:
        """Nobody overtakes, whoever is first and fits starts, and there is never more used than there is."""
        started = super().schedule(now)
        self.begun |= dict.fromkeys(one.request for one in started)
        for one in started:
            for other in self.waiting:
                contends = other.resource is one.resource or other.request not in self.begun
                assert not contends or other.request_arrived >= one.request_arrived
        free = {resource: limit - self.scheduler.used(resource) for resource, limit in self.limits.items()}
        assert min(free.values()) >= 0
        assert not self.waiting or (first := min(self.waiting, key=self.place)).amount > free[first.resource]
        return started

    def place(self, one: Claim) -> tuple[float, int]:
        return one.request_arrived, self.numbers[one]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.001, 0.1, 2.0]),  # since the one before
            st.integers(0, VISION_SLOTS),  # images
            st.integers(1, LLM_TOKENS),
            st.sampled_from([0.2, 3.0]),  # for how long either is held
            st.sampled_from(["", "a"]),
            st.sampled_from(Priority),
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=100, deadline=None)
def test_in_one_queue_the_order_of_starts_is_the_order_of_arrivals(requests):
    line = Line()
    arrived = list(itertools.accumulate(request[0] for request in requests))
    left = [images for _, images, *_ in requests]
    ends: list[tuple[float, int, Claim]] = []  # heap

    def ask(number: int, resource: Resource, amount: int, now: float) -> None:
        _, images, _, _, tenant, priority = requests[number]
        kind = Kind.of(images)
        more = {"resource": resource, "tenant": tenant, "priority": priority}
        assert line.submit(claim(kind, amount, now, request=number, request_arrived=arrived[number], **more), now)

    def go_on(now: float) -> None:
        for one in line.schedule(now):
            heapq.heappush(ends, (now + requests[one.request][3], line.numbers[one], one))

    def end_first() -> None:
        at, _, one = heapq.heappop(ends)
        line.release(one, at)
        if one.resource is Resource.VISION:
            left[one.request] -= 1
            if not left[one.request]:
                ask(one.request, Resource.LLM, requests[one.request][2], at)
        else:
            line.scheduler.limit.end(one.request, at, answered=True, missed=False)
        go_on(at)

    for number, (now, (_, images, tokens, *_)) in enumerate(zip(arrived, requests, strict=True)):
        while ends and ends[0][0] <= now:
            end_first()
        for _ in range(images):
            ask(number, Resource.VISION, 1, now)
        if not images:
            ask(number, Resource.LLM, tokens, now)
        go_on(now)
    while ends:
        end_first()
    assert not line.waiting
    assert list(line.begun) == list(range(len(requests)))


def test_in_one_queue_a_follow_up_waits_behind_an_image_that_waits_for_its_slot():
    line = Line()
    line.submit(encoded := in_line(0, Resource.VISION, VISION_SLOTS), 0.0)
    assert line.schedule(0.0) == [encoded]
    line.submit(image := in_line(1, Resource.VISION, 1), 1.0)
    line.submit(follow_up := in_line(2, amount=1), 2.0)
    assert line.schedule(2.0) == []
    line.release(encoded, 3.0)
    assert line.schedule(3.0) == [image, follow_up]


def test_in_one_queue_who_was_encoded_goes_before_those_that_came_later_and_holds_up_no_image():
    line = Line()
    for one in (first := in_line(0), seen := in_line(1, Resource.VISION, 1)):
        line.submit(one, 1.0)
    line.schedule(1.0)
    line.submit(later := in_line(2), 2.0)
    line.release(seen, 3.0)
    line.submit(prefill := in_line(1), 3.0)
    assert line.schedule(3.0) == []
    line.release(first, 4.0)
    assert line.schedule(4.0) == [prefill]
    line.release(later, 5.0)
    line.submit(image := in_line(5, Resource.VISION, 1), 5.0)
    assert line.schedule(5.0) == [image]


def test_in_one_queue_deadlines_hold():
    line = Line()
    for one in (first := in_line(0, Resource.VISION, VISION_SLOTS), in_line(1, Resource.VISION, 1, deadline=3.0)):
        line.submit(one, 1.0)
    line.submit(follow_up := in_line(2), 2.0)
    assert line.schedule(2.0) == [first]
    assert line.schedule(3.0) == [follow_up]


def test_more_than_there_is_can_never_be_claimed():
    with pytest.raises(ValueError, match="the claim on vision is 4, more than its limit of 3"):
        Scheduler(VISION_SLOTS, LLM_TOKENS).submit(claim(amount=4, resource=Resource.VISION), 0.0)


def test_images_that_wait_start_together_as_a_batch_gives_back_its_slots():
    house = House(vision_slots=4)
    batches = [[slot(arrived=float(i)) for _ in range(4)] for i in range(3)]
    for batch in batches:
        for one in batch:
            house.submit(one, 2.0)
    for batch in batches:
        assert house.schedule(3.0) == batch
        for one in batch:
            house.release(one, 3.0)


@pytest.mark.parametrize(("images", "kind"), [(0, Kind.FOLLOW_UP), (1, Kind.SINGLE_IMAGE), (5, Kind.MULTI_IMAGE)])
def test_the_kind_is_by_the_images_that_are_new(images, kind):
    assert Kind.of(images) is kind


def one_a_second(seconds: int = 5) -> House:
    """One vision slot, of which each of ten claims takes a second; tenant a. One runs and the rest wait at the end."""
    house = House(vision_slots=1)
    queue = deque(slot(tenant="a") for _ in range(10))
    for one in queue:
        house.submit(one, 0.0)
    for second in range(1, seconds + 1):
        house.schedule(second - 1.0)
        house.release(queue.popleft(), float(second))
    house.schedule(float(seconds))
    return house


def test_the_queue_of_another_tenant_is_no_wait():
    house = one_a_second()
    assert house.scheduler.submit(slot(arrived=5.0, deadline=8.0, tenant="a"), 5.0) is not None
    assert house.scheduler.submit(slot(arrived=5.0, deadline=8.0, tenant="b"), 5.0) is None


def test_of_two_tenants_each_waits_for_twice_its_own_claims_at_the_most():
    house = one_a_second(2)
    assert house.submit(slot(arrived=2.0, tenant="b"), 2.0)
    refusal = house.scheduler.submit(slot(arrived=2.0, deadline=3.5, tenant="b"), 2.0)
    assert refusal.retry_after_s == pytest.approx(2.0, rel=0.01)


def test_the_time_that_the_work_takes_must_be_left_after_the_wait():
    """Four wait, so the fifth starts after 4 s and ends after 5."""
    assert one_a_second().scheduler.submit(slot(arrived=5.0, deadline=9.9, tenant="a"), 5.0) is not None
    assert one_a_second().scheduler.submit(slot(arrived=5.0, deadline=10.1, tenant="a"), 5.0) is None


def test_the_rate_is_measured_from_when_the_first_claim_waits():
    house = House(vision_slots=1)
    house.submit(first := slot(), 0.0)
    house.schedule(0.0)
    house.submit(slot(), 1.0)
    house.submit(slot(), 1.0)
    house.release(first, 3.0)  # one in 2 s
    house.schedule(3.0)
    assert house.scheduler.submit(slot(arrived=3.0, deadline=4.0), 3.0).retry_after_s == pytest.approx(2.0)


def test_a_tenant_that_holds_nothing_comes_before_one_that_holds_one_image():
    house = House(vision_slots=2)
    house.submit(slot(tenant="a"), 0.0)
    house.submit(ends := slot(tenant="b"), 0.0)
    house.schedule(0.0)
    house.submit(slot(1.0, tenant="a"), 1.0)
    house.submit(later := slot(2.0, tenant="c"), 2.0)
    house.release(ends, 3.0)
    assert house.schedule(3.0) == [later]


def narrow_limit() -> ConcurrencyLimit:
    limit = ConcurrencyLimit(10.0)
    for number in range(2):
        limit.contention.start(number, 0.0, 10.0)
    limit.end(0, 1.0, answered=False, missed=True)
    assert limit.is_narrow
    return limit


@pytest.mark.parametrize(("priority", "counts"), [(Priority.NORMAL, True), (Priority.LOW, False)])
def test_a_refusal_of_low_priority_is_no_strain(priority, counts):
    scheduler = Scheduler(1, 100, limit=narrow_limit())
    late = slot(arrived=2.0, deadline=12.0, priority=priority, request="late")
    assert scheduler.submit(late, 2.0) is None
    _, expired = scheduler.schedule(4.1)  # a fifth of its ten seconds
    assert expired == [late]
    assert (scheduler.waiting_since(4.1) is not None) == counts


def test_a_claim_that_a_narrow_limit_lets_wait_no_longer_is_over():
    """It may start until a fifth of its ten seconds has passed, and not at that moment."""
    scheduler = Scheduler(1, 100, limit=narrow_limit())
    scheduler.submit(late := slot(arrived=2.0, deadline=12.0, request="late"), 2.0)
    assert scheduler.schedule(4.0) == ([], [late])
    assert late.over is True


@pytest.mark.parametrize("is_narrow", [True, False])
def test_a_request_that_would_wait_long_for_a_narrow_limit_is_refused_at_once(is_narrow):
    """It may wait a fifth of its ten seconds, and three wait that take a second each."""
    limit = narrow_limit() if is_narrow else ConcurrencyLimit(10.0)
    scheduler = Scheduler(1, 100, limit=limit)
    waiting = [slot(arrived=1.0, request=object()) for _ in range(4)]
    for one in waiting:
        scheduler.submit(one, 1.0)
    assert scheduler.schedule(1.0)[0] == waiting[:1]
    scheduler.release(waiting[0], 2.0)
    refusal = scheduler.submit(slot(arrived=2.0, deadline=12.0, request="new"), 2.0)
    assert (refusal is not None) == is_narrow
    assert limit.refusing_since(2.0) == (2.0 if is_narrow else None)
