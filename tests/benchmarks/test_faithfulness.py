"""What is covered of an image, and what the report says of the answers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.faithfulness import Covered, at_random, cover, most_relevant, shifted, summary


def test_the_most_relevant_tenth_of_the_cells_is_chosen() -> None:
    relevance = np.zeros((16, 16))
    relevance[3, 4] = 1.0
    relevance[7, :] = 0.5
    cells = most_relevant(relevance)
    assert cells.sum() == 26
    assert cells[3, 4]
    assert cells[7].all()


def test_as_many_cells_are_drawn_at_random() -> None:
    drawn = [at_random((16, 16), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert [cells.sum() for cells in drawn] == [26, 26, 26]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_the_shifted_cells_have_the_maps_shape_elsewhere() -> None:
    cells = np.zeros((16, 16), bool)
    cells[2:7, 3:8] = cells[7, 3] = True
    turned = {np.roll(cells, (down, right), (0, 1)).tobytes() for down in range(16) for right in range(16)}
    rng = np.random.default_rng(1)
    drawn = [shifted(cells, rng) for _ in range(600)]
    assert all(each.tobytes() in turned for each in drawn)
    assert not any((each == cells).all() for each in drawn)
    assert np.mean(drawn, 0) == pytest.approx(26 / 256, abs=0.06)  # no place is covered more than another


def test_cells_are_covered_with_the_mean_colour_and_nothing_else_is() -> None:
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24] = 200
    cells = np.zeros((16, 16), bool)
    cells[15, 2] = True
    covered = cover(pixels, cells)
    assert (covered[45:48, 4:6] == 100).all()
    covered[45:48, 4:6] = 0
    assert (covered == pixels).all()


def test_the_report_compares_each_with_its_bar() -> None:
    told = [
        Covered(str(number % 10), number != 0, (number == 0, False, False), (number < 2, False, False), False)
        for number in range(20)
    ]
    report = summary(told)
    assert (report["right_answers"], report["images"], report["met"]) == (20, 10, True)
    assert report["most_relevant_covered"]["value"] == 0.95
    assert report["random_covered"]["value"] == pytest.approx(1 / 60, abs=1e-4)
    assert report["shifted_covered"]["value"] == pytest.approx(2 / 60, abs=1e-4)
    assert not summary([Covered("a", False, (False,), (False,), False)])["met"]
    with pytest.raises(ValueError, match="nothing to cover"):
        summary([])
