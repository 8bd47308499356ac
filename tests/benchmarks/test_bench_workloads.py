"""Test the benchmark's requests and arrival times."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest

from benchmarks.bench.scenes import Scenes
from benchmarks.bench.workloads import KNOWN, Ask, Workload, asks, bursts, poisson, zipf


def first(count: int, workload: Workload, seed: int = 1, first_new: int = KNOWN) -> list[Ask]:
    return list(itertools.islice(asks(workload, seed, first_new), count))


@pytest.mark.parametrize("shape", Workload.SHAPES)
def test_the_same_seed_asks_the_same(shape):
    assert first(50, Workload(shape)) == first(50, Workload(shape))


def test_cold_never_shows_an_image_twice():
    seen = [number for ask in first(500, Workload("cold")) for number in ask.images]
    assert len(set(seen)) == 500
    assert min(seen) >= KNOWN


def test_follow_ups_are_about_known_images():
    assert all(ask.follow_up and ask.images[0] < KNOWN for ask in first(200, Workload("follow_up")))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_mixed_keeps_its_share_at_every_moment(share):
    follow_ups = 0
    for number, ask in enumerate(first(400, Workload("mixed", share=share)), 1):
        follow_ups += ask.follow_up
        assert abs(follow_ups - share * number) <= 1


def test_multi_image_brings_new_images_with_every_question():
    asked = first(20, Workload("multi_image", images=3))
    assert [len(ask.images) for ask in asked] == [3] * 20
    assert len({number for ask in asked for number in ask.images}) == 60


def test_repeat_follows_zipf():
    drawn = [ask.images[0] - KNOWN for ask in first(20_000, Workload("repeat", zipf=1.1))]
    share = np.bincount(drawn, minlength=200) / len(drawn)
    assert share[:5] == pytest.approx(zipf(200, 1.1)[:5], abs=0.01)
    assert not any(ask.follow_up for ask in first(10, Workload("repeat")))  # every question has the image's bytes


def test_a_share_of_clients_hangs_up():
    asked = first(2_000, Workload("cold", cancels=0.2, cancel_within_s=0.5))
    after = [ask.cancel_after_s for ask in asked if ask.cancel_after_s is not None]
    assert len(after) / len(asked) == pytest.approx(0.2, abs=0.03)
    assert max(after) <= 0.5


def test_new_images_are_not_numbered_as_known_ones():
    with pytest.raises(ValueError, match="known"):
        first(1, Workload("cold"), first_new=KNOWN - 1)


def test_poisson_arrivals_have_their_rate_and_spread():
    times = list(itertools.islice(poisson(20.0, seed=3), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(
        0.05, rel=0.05
    )  # an exponential's mean and standard deviation are equal


def test_bursts_come_at_once():
    assert list(itertools.islice(bursts(3, 2.0), 7)) == [0, 0, 0, 2, 2, 2, 4]


def test_images_differ_by_their_number_and_only_by_it():
    scenes = Scenes.load(2)
    assert scenes.jpeg(5) == scenes.jpeg(5)
    assert scenes.jpeg(5) != scenes.jpeg(7)  # the same scene
    assert scenes.question(0, 1) != scenes.question(0, 2)
