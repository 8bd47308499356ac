"""The fleet's sizes follow its figures, and the simulation agrees with what queueing theory knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fleet import RATES, SIMULATED_REQUESTS, Fleet, Hardware, Traffic, needed, simulate

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


def test_a_tenth_of_the_largest_run_takes_a_tenth_of_a_minute_of_one_core() -> None:
    rate = RATES[-1]
    assert rate == 100_000
    fleet = needed(rate, HARDWARE, TRAFFIC)
    assert simulate(fleet, HARDWARE, TRAFFIC, rate, requests=SIMULATED_REQUESTS // 10)["cpu_s"] <= 60 / 10


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
