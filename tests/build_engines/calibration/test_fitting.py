"""The calibration's regressions, on answers whose probabilities are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from build_engines.calibration.asking import ABSENT, WORDS, Outcome, Task, is_found
from build_engines.calibration.fitting import Asked, TooFew, fitted, regression, strangeness
from build_engines.calibration.foreign import PHOTOGRAPHS, foreign
from build_engines.scenes.questions import Question
from service.core.confidence import Signals


def outcome(rng: np.random.Generator, group: str = "new") -> Outcome:
    """An answer that is right as often as the model says; an absent object has a low peak and no right answer."""
    probability = float(rng.uniform(0.3, 1.0))
    absent = group == ABSENT
    peak = float(rng.uniform(0.0, 0.3) if absent else rng.uniform(0.7, 1.0))
    signals = Signals("what colour is the star?", "red", math.log(probability), peak, 0.1, 0.2, False, 0.0, 1)
    return Outcome(
        Task(0, group, signals.question, "red", not absent), signals, not absent and rng.random() < probability
    )


def material(images: int = 200) -> list[Asked]:
    rng = np.random.default_rng(0)
    own = [
        Asked(
            rng.normal(0, 1, 12).astype(np.float32),
            [*(outcome(rng) for _ in range(8)), outcome(rng, ABSENT)],
        )
        for _ in range(images)
    ]
    return own + [Asked(rng.normal(4, 1, 12).astype(np.float32), [], is_foreign=True) for _ in range(images // 4)]


def test_a_regression_finds_the_slopes_that_made_the_labels():
    rng = np.random.default_rng(1)
    signals = rng.normal(3, 2, (20_000, 2))
    odds = 1.5 * signals[:, 0] - 0.5 * signals[:, 1] - 2
    found = regression(signals, rng.random(len(odds)) < 1 / (1 + np.exp(-odds)))
    assert found.weights == pytest.approx((1.5, -0.5), abs=0.08)
    assert found.bias == pytest.approx(-2, abs=0.15)


def test_the_fitted_confidence_is_how_often_answers_are_right():
    calibration = fitted(material(), WORDS, {"weights": "w"})
    assert calibration.fitted_on["images"] == 200
    assert calibration.fitted_on["weights"] == "w"
    for probability in (0.5, 0.9):
        signals = Signals("what colour is the star?", "red", math.log(probability), 0.9, 0.1, 0.2, False, 0.0, 1)
        assert calibration.confidence(signals).value == pytest.approx(probability, abs=0.06)
    absent = Signals("what colour is the star?", "red", math.log(0.9), 0.1, 0.1, 0.2, False, 0.0, 1)
    assert calibration.confidence(absent).value < 0.2
    assert calibration.confidence(absent).weakest == "not_found"
    own = [calibration.familiar.of([strangeness(each.summary, calibration.centre, calibration.scale)])
           for each in material()]  # fmt: skip
    assert min(own[:200]) > 0.5 > max(own[200:])


def test_kinds_of_questions_and_answers_have_their_own_share_of_right_ones():
    """A model that is as sure of its counts as of its colours, and wrong about half of them, most of all about a 5."""
    rng = np.random.default_rng(2)

    def said(question: str, answer: str, right: float) -> Outcome:
        signals = Signals(question, answer, math.log(0.9), 0.9, 0.1, 0.2, False, 0.0, 1)
        return Outcome(Task(0, "new", question, answer, True), signals, bool(rng.random() < right))

    kinds = [("what colour is the star?", "red", 0.95), ("how many stars are there?", "2", 0.7),
             ("how many stars are there?", "5", 0.3)]  # fmt: skip
    seen = [Asked(rng.normal(0, 1, 12).astype(np.float32), [said(*kind) for kind in kinds]) for _ in range(600)]
    rare = Asked(rng.normal(0, 1, 12).astype(np.float32), [said("whence?", "there", 0.0)])
    calibration = fitted([*seen, rare], WORDS, {})
    for question, answer, right in kinds:
        signals = Signals(question, answer, math.log(0.9), 0.9, 0.1, 0.2, False, 0.0, 1)
        assert calibration.confidence(signals).value == pytest.approx(right, abs=0.08)
    assert set(calibration.shifts.answer) == {"red", "2", "5"}
    assert "whence" not in calibration.shifts.question
    assert calibration.shifts.question.keys() >= {"many", "colour"}


def test_a_count_is_as_right_as_it_agrees_with_the_map():
    """A model that is as sure of a count as the map shows as of another one, and mostly wrong if it shows more."""
    rng = np.random.default_rng(3)
    question = "how many stars are there?"

    def signals(areas: int) -> Signals:
        return Signals(question, "2", math.log(0.9), 0.9, 0.1, 0.2, False, 0.0, areas)

    def said(areas: int, right: float) -> Outcome:
        return Outcome(Task(0, "new", question, "2", True), signals(areas), bool(rng.random() < right))

    shares = {2: 0.95, 3: 0.2, 1: 0.5}
    seen = [
        Asked(rng.normal(0, 1, 12).astype(np.float32), [said(*each) for each in shares.items()]) for _ in range(600)
    ]
    calibration = fitted(seen, WORDS, {})
    for areas, right in shares.items():
        assert calibration.confidence(signals(areas)).value == pytest.approx(right, abs=0.05)


def test_too_few_wrong_answers_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(TooFew, match=r"^8 of \d+ answers are right|at least 50 right and 50 wrong"):
        fitted([Asked(np.zeros(12, np.float32), [outcome(rng) for _ in range(8)])], WORDS, {})


@pytest.mark.parametrize(
    ("text", "answer", "kind", "found"),
    [
        ("is there a red star?", "no", "exist", False),
        ("how many red stars are there?", "0", "count", False),
        ("how many red stars are there?", "2", "count", True),
        ("is the red star left of the ring?", "no", "relation", True),
        ("how many objects are there?", "4", "count", None),
    ],
)
def test_a_scenes_question_names_what_is_there_or_not(text, answer, kind, found):
    assert is_found(Question(text, answer, kind, ())) is found


def test_pictures_for_measuring_are_not_those_for_fitting_and_the_same_every_time():
    def files(use: str) -> set[str]:
        return {f"{folder}/{name}" for folder, names in PHOTOGRAPHS[use] for name in names}  # type: ignore[index]

    assert not files("fit") & files("measure")
    fit, again, measure = ([each.data for each in foreign(use, 2)] for use in ("fit", "fit", "measure"))
    assert fit == again
    assert not set(fit) & set(measure)
    assert len(set(fit)) == 8
