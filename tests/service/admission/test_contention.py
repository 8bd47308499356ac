"""The register of requests in service, with a clock of our own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.contention import MEDIAN_STEP, SPARE, Contention

TARGET_S = 1.0


def test_what_is_lost_to_others_counts_once_it_is_what_a_request_can_spare():
    contention = Contention(TARGET_S, 0.0)
    contention.start("first", 0.0, 20.0)
    contention.start("second", 10.0, 20.0)
    spare_s = SPARE * 20.0 - TARGET_S
    assert contention.waiting_since(10.0 + 2 * spare_s) is None
    assert contention.waiting_since(20.0 + 2 * spare_s) == pytest.approx(
        15.0 + 2 * spare_s
    )  # five of these ten were lost
    contention.end("first", 30.0, answered=False)
    assert contention.waiting_since(40.0) is None


def test_what_will_be_lost_counts_before_it_is():
    contention = Contention(TARGET_S, 0.0)
    contention.start("alone", 0.0, 20.0)
    contention.end("alone", 2.0, answered=True)
    for request in range(7):
        contention.start(request, 10.0, 20.0)
    spare_s = SPARE * 20.0 - TARGET_S
    assert contention.waiting_since(10.0) == pytest.approx(10.0 + spare_s - 2.0 * 6)
    assert contention.waiting_since(17.0) == pytest.approx(17.0 + spare_s - 2.0 * 6)  # as it was foreseen: 1 s of 7
    assert contention.waiting_since(24.0) == pytest.approx(24.0 + spare_s - 2.0 * 6)
    assert contention.waiting_since(31.0) == pytest.approx(31.0 + spare_s - 3.0 * 6)  # they take longer


def test_one_long_answer_does_not_make_longer_ones_expected_of_others():
    contentions = [Contention(TARGET_S, 0.0) for _ in range(2)]
    for contention, longest_s in zip(contentions, (1.1, 100.0), strict=True):
        for answer_s in (1.0, longest_s):
            contention.start("alone", 0.0, 20.0)
            contention.end("alone", answer_s, answered=True)
        for request in range(20):
            contention.start(request, 200.0, 20.0)
    assert contentions[0].waiting_since(200.0) == contentions[1].waiting_since(200.0)


def test_an_answers_own_time_follows_the_median_step_by_step():
    contention = Contention(TARGET_S, 0.0)
    for answer_s, own_s in ((2.0, 2.0), (5.0, 2.0 * MEDIAN_STEP), (0.1, 2.0), (0.1, 2.0 / MEDIAN_STEP)):
        contention.start("alone", 0.0, 20.0)
        assert contention.end("alone", answer_s, answered=True) == answer_s
        assert contention.own_s == pytest.approx(own_s)
    assert contention.end("alone", 1.0, answered=True) is None


def test_a_request_that_ends_in_its_pause_pauses_nobody():
    contention = Contention(TARGET_S, 0.0)
    for request in ("paused", "working"):
        contention.start(request, 0.0, 20.0)
    assert contention.pause("paused")
    assert contention.working == 1
    contention.end("paused", 1.0, answered=False)
    assert (contention.working, len(contention)) == (1, 1)


def test_who_may_wait_for_the_others_never_waits_too_long_for_them():
    contention = Contention(TARGET_S, 0.0)
    for request in range(3):
        contention.start(request, 0.0, math.inf)
    assert contention.waiting_since(1000.0) is None


steps = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5), st.floats(0, 10) | st.none()), max_size=40)


@given(steps)
def test_the_contentions_wait_is_the_longest_of_those_that_each_adds_up_for_itself(steps):
    contention, now = Contention(TARGET_S, 0.0), 0.0
    lost_s: dict[int, float] = {}  # nobody is answered, so nobody is expected to lose any more
    came_with_s: dict[int, float] = {}
    for gap_s, request, allowed_s in steps:
        now += gap_s
        for each in lost_s:
            lost_s[each] += gap_s * (len(lost_s) - 1) / len(lost_s)
        if allowed_s is None:
            contention.end(request, now, answered=False)
            lost_s.pop(request, None)
        elif request not in lost_s:
            contention.start(request, now, allowed_s)
            lost_s[request], came_with_s[request] = 0.0, allowed_s
        waits_s = [
            min(lost_s[each], came_with_s[each]) - max(SPARE * came_with_s[each] - TARGET_S, 0.0) for each in lost_s
        ]
        longest_s = max(waits_s, default=0.0) if len(lost_s) > 1 else 0.0
        since = contention.waiting_since(now)
        assert (0.0 if since is None else now - since) == pytest.approx(max(longest_s, 0.0), abs=1e-6)
