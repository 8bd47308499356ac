"""What decides whether an adapted allocator gains anything."""

from __future__ import annotations

import numpy as np

from build_engines.adapt.measure import NEARER, Spent, _differences, _nearer
from build_engines.train.selection import GUIDED, RANDOM

QUESTIONS = 200


def spent(values: np.ndarray) -> Spent:
    return Spent(values.astype(float), np.full(len(values), 112), np.arange(len(values)))


def test_questions_that_only_the_closer_view_answers_are_told_apart():
    """The guided arm reads what is small. Of the other questions, which are most, neither arm has more."""
    rng = np.random.default_rng(0)
    which = np.arange(QUESTIONS) < 40
    common = rng.random(QUESTIONS) < 0.8
    ours = np.where(which, rng.random(QUESTIONS) < 0.6, common)
    theirs = np.where(which, rng.random(QUESTIONS) < 0.2, common)
    noise = ~which & (rng.random(QUESTIONS) < 0.1)
    found = {
        (GUIDED, 112, False): spent(common),
        (RANDOM, 112, False): spent(common),
        (GUIDED, 112, True): spent(ours & ~noise),
        (RANDOM, 112, True): spent(theirs),
    }
    whole = _differences(found, (GUIDED, RANDOM))
    near = _nearer(found, (GUIDED, RANDOM), which)[NEARER]
    assert near["questions"] == 40
    assert near["interval"][0] > 0.1
    assert near["difference"] > whole["closer view"]["difference"] + 0.2
    assert whole["whole view"]["difference"] == 0


def test_without_such_questions_nothing_is_told_of_them():
    found = {(arm, 112, True): spent(np.ones(10)) for arm in (GUIDED, RANDOM)}
    assert _nearer(found, (GUIDED, RANDOM), np.zeros(10, bool)) == {}
    assert _nearer({}, (GUIDED, RANDOM), np.zeros(0, bool)) == {}


def test_arms_that_are_equal_gain_nothing_there():
    found = {(arm, 112, True): spent(np.arange(10) % 2) for arm in (GUIDED, RANDOM)}
    assert _nearer(found, (GUIDED, RANDOM), np.arange(10) < 5)[NEARER]["interval"][0] <= 0
