"""Reservations, with a clock of our own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.drain_rate import DrainRate
from service.admission.quota import UNITS, Cost, Quota, Refusal

LIMITS = Cost(nbytes=1000, pixels=100, tokens=50)
costs = st.builds(Cost, st.integers(0, 400), st.integers(0, 40), st.integers(0, 20))
tenants = st.sampled_from(["", "a", "b", "c"])


@pytest.mark.slow
@given(st.lists(st.tuples(costs, tenants, st.booleans()), max_size=60))
def test_no_limit_is_ever_passed_and_everything_comes_back(steps):
    quota, held = Quota(LIMITS), []
    for now, (cost, tenant, leaves) in enumerate(steps):
        if leaves and held:
            quota.give_back(*held.pop(0), now)
        elif quota.reserve(cost, tenant, now) is None:
            held.append((cost, tenant))
        assert all(0 <= have <= limit for have, limit in zip(quota.held, LIMITS, strict=True))
        assert quota.held == tuple(map(sum, zip(*[cost for cost, _ in held], strict=True))) if held else (0, 0, 0)
    for cost, tenant in held:
        quota.give_back(cost, tenant, len(steps))
    assert quota.held == Cost()
    assert not quota._tenants


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from("abcdef")), max_size=80))
def test_there_is_always_room_for_a_tenant_that_holds_nothing(steps):
    quota = Quota(Cost(tokens=600))
    for cost, tenant in steps:
        quota.reserve(Cost(tokens=cost), tenant, 0.0)
    assert quota.refusal(Cost(tokens=5), "new") is None


def test_a_tenant_alone_holds_three_quarters_and_who_names_none_everything():
    named, unnamed = Quota(Cost(tokens=100)), Quota(Cost(tokens=100))
    while (refusal := named.reserve(Cost(tokens=1), "a", 0.0)) is None:
        pass
    assert refusal.code == "tenant_share"
    assert named.held.tokens == 75
    while (refusal := unnamed.reserve(Cost(tokens=1), "", 0.0)) is None:
        pass
    assert refusal.code == "saturated"
    assert unnamed.held.tokens == 100


def test_a_closed_house_takes_nobody_and_lets_everybody_out():
    quota = Quota(LIMITS)
    quota.reserve(Cost(tokens=5), "", 0.0)
    quota.closed = True
    stopping = Refusal("shutting_down", "this server is stopping: try again, another server answers", 1.0)
    assert quota.refusal(Cost(), "") == stopping
    assert quota.reserve(Cost(tokens=1), "", 0.5) == stopping
    assert quota.reserve(Cost(tokens=1), "", 0.5, inside=True) is None
    quota.give_back(Cost(tokens=6), "", 1.0)
    assert quota.held == Cost()


def test_who_is_refused_is_told_how_long_the_missing_units_take_to_drain():
    quota = Quota(Cost(tokens=100))
    quota.reserve(Cost(tokens=100), "", 0.0)
    for second in range(1, 21):  # 10 a second
        quota.give_back(Cost(tokens=10), "", second)
        quota.reserve(Cost(tokens=10), "", second)
    assert quota.refusal(Cost(tokens=30), "").retry_after_s == pytest.approx(3.0, rel=0.01)


def test_idle_time_says_nothing_of_how_fast_we_drain():
    drain = DrainRate()
    assert drain.seconds_for(10) == 0
    drain.observe(0.0, 0, wanted=True)
    drain.observe(1.0, 5, wanted=False)
    drain.observe(1000.0, 0, wanted=True)
    drain.observe(1001.0, 5, wanted=True)
    assert drain.seconds_for(10) == pytest.approx(2.0, rel=0.01)


def test_the_newest_seconds_count_most():
    drain = DrainRate()
    for second in range(100):
        drain.observe(second, 1, wanted=True)
    for second in range(100, 140):
        drain.observe(second, 10, wanted=True)
    assert drain.seconds_for(10) == pytest.approx(1.0, rel=0.05)


def drained_at(units_a_second: float, held: int, limit: int = 100, tenant: str = "") -> Quota:
    """Holds that many tokens after a while at that rate, always more than half full."""
    quota = Quota(Cost(tokens=limit))
    quota.reserve(Cost(tokens=held), tenant, 0.0)
    for step in range(1, 101):
        now = step / units_a_second
        quota.give_back(Cost(tokens=1), tenant, now)
        quota.reserve(Cost(tokens=1), tenant, now)
    return quota


def test_retry_after_is_the_time_for_what_is_missing_not_for_all_that_is_asked():
    quota = drained_at(10.0, held=90)
    assert quota.refusal(Cost(tokens=30), "").retry_after_s == pytest.approx(2.0, rel=0.02)  # 20 are missing


def test_retry_after_of_a_full_share_is_the_time_until_the_tenant_holds_less():
    quota = drained_at(10.0, held=70, tenant="a")
    refusal = quota.refusal(Cost(tokens=25), "a")
    assert refusal.code == "tenant_share"
    assert refusal.retry_after_s == pytest.approx((70 + 25 - 3 * 30) / 10, rel=0.02)


@pytest.mark.parametrize(("ask", "fits"), [(10, True), (11, False)])
def test_a_limit_may_be_reached_and_not_passed(ask, fits):
    quota = Quota(Cost(tokens=100))
    quota.reserve(Cost(tokens=90), "", 0.0)
    assert (quota.refusal(Cost(tokens=ask), "") is None) == fits


@pytest.mark.parametrize(("ask", "fits"), [(75, True), (76, False)])
def test_a_tenant_alone_gets_three_quarters(ask, fits):
    quota, held = Quota(Cost(tokens=100)), 0
    for _ in range(ask):
        if quota.reserve(Cost(tokens=1), "a", 0.0) is None:
            held += 1
    assert (held == ask) == fits


def test_only_a_unit_that_is_more_than_half_held_is_measured():
    quota = Quota(Cost(tokens=100))
    for second in range(20):
        quota.reserve(Cost(tokens=50), "", second)
        quota.give_back(Cost(tokens=50), "", second + 0.5)
    quota.reserve(Cost(tokens=100), "", 30.0)
    assert quota.refusal(Cost(tokens=10), "").retry_after_s == 0.0


def test_a_refusal_says_what_is_in_use_and_what_was_kept_free_counts_as_used():
    quota = Quota(Cost(nbytes=100_000, pixels=100, tokens=5_000))
    assert quota.reserve(Cost(tokens=3_000), "", 0.0) is None
    assert quota.refusal(Cost(tokens=1_500), "", keep_free=Cost(tokens=500)) is None
    for refusal in (
        quota.refusal(Cost(tokens=1_501), "", keep_free=Cost(tokens=500)),
        quota.reserve(Cost(tokens=1_501), "", 0.0, keep_free=Cost(tokens=500)),
    ):
        assert refusal is not None
        assert refusal.code == "saturated"
        full = f"the server is at its limit of {UNITS['tokens']} (3,000 of 4,500 are in use)"
        assert refusal.message == f"{full}: try again in a few seconds"
    assert quota.held == Cost(tokens=3_000)


def test_a_tenant_may_hold_its_whole_share_and_not_one_more():
    """Three times what is free: 810 of 4,000 are."""
    quota = Quota(Cost(tokens=4_000))
    assert quota.reserve(Cost(tokens=800), "", 0.0) is None
    assert quota.reserve(Cost(tokens=2_390), "a", 0.0) is None
    assert quota.refusal(Cost(tokens=40), "a") is None
    refusal = quota.refusal(Cost(tokens=41), "a")
    assert refusal is not None
    assert refusal.code == "tenant_share"
    share = f"tenant a is at its share of {UNITS['tokens']} (2,390 of 4,000 are in use)"
    assert refusal.message == f"{share}: try again in a few seconds"
