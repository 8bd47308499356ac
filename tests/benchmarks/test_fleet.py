"""The fleet's sizes follow its figures, and the simulation agrees with what queueing theory knows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import pytest

from benchmarks.fleet import RATES, RESULTS, SIMULATED_REQUESTS, Fleet, Hardware, Traffic, needed, simulate

HARDWARE, TRAFFIC = Hardware(), Traffic()


def test_what_a_rate_needs_grows_with_it() -> None:
    small, large = needed(1_000, HARDWARE, TRAFFIC), needed(100_000, HARDWARE, TRAFFIC)
    assert large.gateways == pytest.approx(100 * small.gateways, rel=0.1)
    assert large.llm == pytest.approx(100 * small.llm, rel=0.5)
    assert needed(1, HARDWARE, TRAFFIC) == Fleet(1, 1, 1, 1)


def test_a_balancer_that_goes_by_image_spares_redis() -> None:
    spread = needed(100_000, HARDWARE, TRAFFIC)
    by_image = needed(100_000, HARDWARE, replace(TRAFFIC, other_gateway=0.0))
    assert by_image.redis == pytest.approx(spread.redis * TRAFFIC.new_images, abs=1)
    assert by_image.gateways == spread.gateways


def test_a_fleet_is_as_busy_as_it_was_sized_for() -> None:
    rate = 1_000
    found = simulate(needed(rate, HARDWARE, TRAFFIC, load=0.7), HARDWARE, TRAFFIC, rate, requests=8_000)
    assert found["refused"] == 0
    assert found["busiest"] == "gateways"
    assert found["busy"]["gateways"] == pytest.approx(0.65, abs=0.05)  # 9 gateways for 8.4


def calls_in(work: Callable[[], object]) -> int:
    """How many functions the work calls, of Python and of C: the same on a slow machine."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_a_request_is_as_much_work_in_a_fleet_of_hundreds_as_in_a_small_one() -> None:
    """430 calls here, and 830 more if each request looked at all gateways."""
    rate, requests = RATES[-1], SIMULATED_REQUESTS // 20
    fleet = needed(rate, HARDWARE, TRAFFIC)
    assert (rate, fleet.gateways) == (100_000, 826)
    assert calls_in(lambda: simulate(fleet, HARDWARE, TRAFFIC, rate, requests=requests)) < 1_000 * requests


def test_the_recorded_run_of_the_largest_fleet_took_at_most_a_minute_of_one_core() -> None:
    recorded = json.loads((RESULTS / "fleet.json").read_text())["as_sized"][str(RATES[-1])]
    assert recorded["asked"] > 0.7 * SIMULATED_REQUESTS  # the first quarter is not counted
    assert recorded["cpu_s"] <= 60


def test_beyond_its_capacity_a_fleet_is_late() -> None:
    fleet = needed(1_000, HARDWARE, TRAFFIC, load=1.0)
    calm = simulate(fleet, HARDWARE, TRAFFIC, 500, requests=4_000)
    crowded = simulate(fleet, HARDWARE, TRAFFIC, 1_500, requests=8_000)
    assert crowded["first_token_p95_ms"] > 10 * calm["first_token_p95_ms"]


def test_a_lone_request_takes_its_stages_one_after_the_other() -> None:
    hardware = replace(HARDWARE, network_s=0.0)
    found = simulate(Fleet(1, 1, 1, 1), hardware, replace(TRAFFIC, new_images=1.0), 0.5, requests=60)
    cpu_s = hardware.gateway_request_s + hardware.gateway_image_s + TRAFFIC.tokens * hardware.gateway_token_s
    first_s = hardware.encode_s + hardware.attend_s + hardware.prefill_s + hardware.step_s + hardware.step_row_s
    assert found["first_token_p50_ms"] == pytest.approx(1e3 * (cpu_s + first_s), rel=0.25)
