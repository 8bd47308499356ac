"""What decides whether an adapted allocator gains anything."""

from __future__ import annotations

import numpy as np

from build_engines.adapt.measure import NEARER, Spent, _differences, _nearer, from_afar
from build_engines.adapt.teacher import Lessons
from build_engines.train.selection import GUIDED, RANDOM

QUESTIONS = 200


def spent(values: np.ndarray, images: np.ndarray | None = None) -> Spent:
    """images: by default one a question."""
    numbers = np.arange(len(values)) if images is None else images
    return Spent(values.astype(float), np.full(len(values), 112), numbers)


def test_there_are_questions_to_measure_even_if_all_trusted_ones_are_answered_from_nearer():
    nearer = [True, True, False, False]
    lessons = Lessons([[]] * 4, [0.1, 0.1, 0.1, 0.9], nearer, np.zeros((4, 256)))
    assert from_afar(lessons, [0, 1, 3], [0, 1, 2, 3]) == [3]
    assert from_afar(lessons, [0, 1], [0, 1, 2]) == [2]
    assert from_afar(lessons, [0, 1], [0, 1]) == [0, 1]


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
    found = {(arm, 112, True): spent(np.arange(40) % 2) for arm in (GUIDED, RANDOM)}
    assert _nearer(found, (GUIDED, RANDOM), np.arange(40) < 20)[NEARER]["interval"] == [0, 0]


def test_few_such_questions_among_many_images_have_an_interval_or_none():
    """A bootstrap that draws the other images too would have none of these in some draws."""
    ours, theirs = np.ones(300), np.zeros(300)
    theirs[::60] = 1
    found = {(GUIDED, 112, True): spent(ours), (RANDOM, 112, True): spent(theirs)}
    low, high = _nearer(found, (GUIDED, RANDOM), np.arange(300) % 25 == 0)[NEARER]["interval"]
    assert 0 < low < high <= 1
    assert _nearer(found, (GUIDED, RANDOM), np.arange(300) == 7) == {}
    one_image = {key: spent(value.values, np.zeros(300, int)) for key, value in found.items()}
    assert _nearer(one_image, (GUIDED, RANDOM), np.ones(300, bool)) == {}
