"""Focus regions: each belongs to the nearest peak, none is empty, and the budget sets their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from build_engines.model.allocation import CELL_COUNT, CELLS
from build_engines.model.focus import FocusRegions, query_groups

FOCUS = FocusRegions()
RELEVANCE = npst.arrays(np.float32, (1, CELL_COUNT), elements=st.sampled_from([0.0, 0.1, 0.5, 0.5001, 0.9, 1.0]))


def regions(relevance: np.ndarray, groups: int = 4) -> np.ndarray:
    return FOCUS(torch.from_numpy(relevance)).read_by(torch.tensor([[groups]]))[0].numpy()


def in_words(relevance: np.ndarray) -> np.ndarray:
    """Compute the contract again, step by step."""
    left, peaks = relevance[0].copy(), []
    place = np.array(np.unravel_index(np.arange(CELL_COUNT), (CELLS, CELLS))).T
    for _ in range(3):
        peaks.append(int(left.argmax()))
        left[np.abs(place - place[peaks[-1]]).max(1) <= 1] = -1
    found = np.zeros(CELL_COUNT, np.int32)
    for cell in range(CELL_COUNT):
        away = [np.abs(place[cell] - place[peak]) for peak in peaks]
        near = [(int((step**2).sum()), number) for number, step in enumerate(away, 1) if step.max() <= 1]
        found[cell] = min(near)[1] if near else 0
    return found


@given(RELEVANCE)
@settings(max_examples=60, deadline=None)
def test_regions_are_those_of_the_nearest_peak(relevance):
    assert np.array_equal(regions(relevance), in_words(relevance))


@given(RELEVANCE, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_no_region_is_empty_and_none_is_told_that_is_not_used(relevance, groups):
    found = regions(relevance, groups)
    assert set(found.tolist()) == set(range(groups))
    if groups > 1:
        assert found[relevance[0].argmax()] == 1


@given(st.permutations(range(CELL_COUNT)))
@settings(max_examples=20, deadline=None)
def test_a_batch_is_as_its_rows_alone(order):
    first = np.array(order, np.float32)[None] / CELL_COUNT
    both = FOCUS(torch.from_numpy(np.concatenate([first, 1 - first]))).read_by(torch.tensor([[4], [2]]))
    assert np.array_equal(both[0], regions(first))
    assert np.array_equal(both[1], regions(1 - first, 2))


@pytest.mark.parametrize(
    ("particularize", "least", "most", "expected"),
    [(0.0, 32, 128, 1), (0.1, 32, 128, 1), (0.25, 32, 128, 2), (0.5, 32, 128, 3), (1.0, 32, 128, 4), (1.0, 32, 32, 1),
     (0.0, 64, 64, 2), (0.7, 128, 64, 2), (1.0, 0, 1000, 4), (0.0, 0, 0, 1)],
)  # fmt: skip
def test_groups_are_the_budgets(particularize, least, most, expected):
    budget = torch.tensor([[64, 256, least, most]], dtype=torch.int32)
    found = query_groups(torch.tensor([[particularize]]), budget)
    assert (found.item(), found.dtype) == (expected, torch.int32)
