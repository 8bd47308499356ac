"""How many calls may be made again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.upstreams.retry_budget import LEAST_PER_S, MOST_TOKENS, SHARE, RetryBudget


def test_the_first_retries_are_free_and_then_time_or_requests_must_pass():
    budget = RetryBudget(now=0.0)
    assert [budget.take(0.0) for _ in range(int(MOST_TOKENS) + 2)] == [True] * int(MOST_TOKENS) + [False, False]
    assert budget.take(1 / LEAST_PER_S)
    assert not budget.take(1 / LEAST_PER_S)
    for _ in range(round(1 / SHARE) + 1):
        budget.request()
    assert budget.take(1 / LEAST_PER_S)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=300))
def test_retries_never_pass_their_share_of_requests_and_time(steps):
    budget, now, requests, retries = RetryBudget(now=0.0), 0.0, 0, 0
    for is_request, later in steps:
        now += later
        if is_request:
            requests += 1
            budget.request()
        else:
            retries += budget.take(now)
        assert retries <= MOST_TOKENS + SHARE * requests + LEAST_PER_S * now + 1e-6
        assert 0 <= budget.tokens <= MOST_TOKENS


def test_a_clock_that_stands_still_or_goes_back_gives_nothing():
    budget = RetryBudget(now=10.0, tokens=0.5)
    assert not budget.take(10.0)
    assert not budget.take(5.0)
    assert not budget.take(10.0)
