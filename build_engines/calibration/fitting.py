"""Fit a Calibration: one regression each for a familiar image, a found object and a right answer.

Each is a logistic regression of a few signals (service/core/confidence.py), with an L2 penalty on standardised
signals. Every group of questions has a weight of its own, so that no split is calibrated at the cost of
another: their questions cannot be told apart when they are asked. Frequent words of the questions, and frequent
answers, are signals of `right` too, with a penalty of their own. So is what the map shows against what the answer says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from build_engines.calibration.asking import ABSENT, FOREIGN, SMALL_CLOSELY, Outcome
from build_engines.scenes.held_out import NEW, PAIRS, SMALL
from service.core.confidence import (
    FOUND_SIGNALS,
    RIGHT_SIGNALS,
    Calibration,
    Logistic,
    Shifts,
    Words,
    found_signals,
    plain_answer,
    shown_signals,
    words_of,
)

LEAST_SCALE = 1e-3  # of a feature's standard deviation
LEAST_QUESTIONS = 50  # right ones, and wrong ones
# Of one question in the regression for a right answer. Answers about new scenes are right more often than as likely
# answers about held-out pairs and small print, and nothing tells them apart: the weights decide where between them a
# probability lies.
WEIGHTS: Mapping[str, float] = {
    NEW: 2.5,
    PAIRS: 1.2,
    SMALL: 1.0,
    SMALL_CLOSELY: 0.7,
    ABSENT: 0.2,
    FOREIGN: 0.08,
}
# Of the images that a service gets, as many are of the kind that its models know. With a half, 4 % of the reference
# model's own scenes count as unfamiliar, and their right answers as unsure.
OWN_SHARE = 0.75
PENALTY = 0.1  # of L2, on standardised signals
WORD_PENALTY = 33.0  # the same, of words
LEAST_SEEN = 30  # answers that a word must have, or an answer, to be a signal
MOST_WORDS = 500  # the most frequent ones


class TooFew(Exception):
    """There is too little to fit. The message says what."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a calibration is fitted on: one image and the answers about it."""

    summary: npt.NDArray[np.float32]
    outcomes: Sequence[Outcome]
    is_foreign: bool = False  # of no world that the model knows


def fitted(material: Sequence[Asked], words: Words, about: Mapping[str, object]) -> Calibration:
    """Fit everything. Raises TooFew."""
    own = [each for each in material if not each.is_foreign]
    answered = [outcome for each in own for outcome in each.outcomes if outcome.task.group != ABSENT]
    right = sum(outcome.right for outcome in answered)
    if min(right, len(answered) - right) < LEAST_QUESTIONS:
        raise TooFew(
            f"{right} of {len(answered)} answers are right: ask questions with at least {LEAST_QUESTIONS} right and "
            f"{LEAST_QUESTIONS} wrong answers"
        )
    summaries = np.stack([each.summary for each in own])
    centre, scale = summaries.mean(0).astype(np.float32), (summaries.std(0) + LEAST_SCALE).astype(np.float32)
    strange = [strangeness(each.summary, centre, scale) for each in material]
    outcomes = [
        replace(outcome, signals=replace(outcome.signals, strangeness=value))
        for each, value in zip(material, strange, strict=True)
        for outcome in each.outcomes
    ]
    foreign = np.array([each.is_foreign for each in material])
    no_opinion = Logistic((0.0,) * len(RIGHT_SIGNALS), 0.0)
    calibration = Calibration(
        centre,
        scale,
        familiar=_familiar(np.array(strange), foreign),
        found=_found([each for each in outcomes if each.task.group != FOREIGN], words),
        right=no_opinion,
        words=words,
        fitted_on=dict(about)
        | {
            "images": len(own),
            "foreign_images": int(foreign.sum()),
            "questions": dict(Counter(each.task.group for each in outcomes)),
        },
    )
    right, shown, shifts = _right(calibration, outcomes)
    return replace(calibration, right=right, shown=shown, shifts=shifts)


def strangeness(
    summary: npt.NDArray[np.float32], centre: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]
) -> float:
    """As Calibration.strangeness, from an image's summary [3 D]."""
    away = (summary - centre) / scale
    return math.log(float(np.dot(away, away)) / away.size + 1e-9)


def _familiar(strange: npt.NDArray[np.float64], foreign: npt.NDArray[np.bool_]) -> Logistic:
    """Give the own images OWN_SHARE of the weight. Without foreign ones, a half lies four deviations above the mean."""
    if not foreign.any():
        width = max(float(strange.std()), 1e-3)
        return Logistic((-4 / width,), 4 * (float(strange.mean()) + 4 * width) / width)
    weights = np.where(foreign, (1 - OWN_SHARE) / foreign.mean(), OWN_SHARE / (1 - foreign.mean()))
    return regression(strange[:, np.newaxis], ~foreign, weights)


def _found(outcomes: Sequence[Outcome], words: Words) -> Logistic:
    """Fit on questions that name something, or give no opinion if all of them name what is there."""
    named = [each for each in outcomes if each.task.found is not None]
    labels = np.array([bool(each.task.found) for each in named])
    if not named or labels.all() or not labels.any():
        return Logistic((0.0,) * len(FOUND_SIGNALS), 0.0 if not named else 4.0)
    return regression(np.array([found_signals(each.signals, words) for each in named]), labels)


def frequent(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Return the words of the questions, and the answers, that are frequent enough to be signals."""
    words = Counter(word for each in outcomes for word in words_of(each.signals.question))
    answers = Counter(plain_answer(each.signals.answer) for each in outcomes)

    def most(counted: Counter[str]) -> list[str]:
        return sorted(word for word, times in counted.most_common(MOST_WORDS) if times >= LEAST_SEEN)

    return most(words), most(answers)


def _right(calibration: Calibration, outcomes: Sequence[Outcome]) -> tuple[Logistic, Logistic, Shifts]:
    """Fit `right`, `shown` and `shifts` together, on all answers.

    None about an out-of-distribution image or an absent object is right.
    """
    plain = np.array([calibration.right_signals(each.signals) for each in outcomes])
    shown = np.array([shown_signals(each.signals, calibration.words) for each in outcomes])
    words, answers = frequent(outcomes)
    has = np.array(
        [
            [*(word in words_of(each.signals.question) for word in words),
             *(plain_answer(each.signals.answer) == answer for answer in answers)]
            for each in outcomes
        ],
        float,
    ).reshape(len(outcomes), -1)  # fmt: skip
    odds = plain[:, RIGHT_SIGNALS.index("log_odds"), np.newaxis]
    weights = np.array([WEIGHTS.get(each.task.group, 1.0) for each in outcomes])
    smooth = np.hstack([plain, shown])
    penalties = np.repeat([PENALTY, WORD_PENALTY], [smooth.shape[1], 2 * has.shape[1]])
    labels = np.array([each.right for each in outcomes])
    found = regression(np.hstack([smooth, has, has * odds]), labels, weights, penalties=penalties)
    ends = np.cumsum([plain.shape[1], shown.shape[1], has.shape[1]])
    right, of_shown, offsets, slopes = np.split(found.weights, ends)
    shifts = [(round(float(a), 5), round(float(b), 5)) for a, b in zip(offsets, slopes, strict=True)]
    return (
        Logistic(tuple(right.tolist()), found.bias),
        Logistic(tuple(of_shown.tolist()), 0.0),
        Shifts(dict(zip(words, shifts, strict=False)), dict(zip(answers, shifts[len(words) :], strict=True))),
    )


def regression(
    signals: npt.NDArray[np.floating],
    labels: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.float64] | None = None,
    *,
    penalties: npt.NDArray[np.float64] | float = PENALTY,
) -> Logistic:
    """Fit a logistic regression of signals [n, k], in the signals' own units. `penalties` are of each, or of all."""
    mean, deviation = signals.mean(0), signals.std(0)
    deviation = np.where(deviation > 1e-9, deviation, 1.0) * np.sqrt(penalties / PENALTY)
    model = LogisticRegression(C=1 / PENALTY, max_iter=1000)
    model.fit((signals - mean) / deviation, labels, sample_weight=weights)
    slopes = model.coef_[0] / deviation
    return Logistic(tuple(slopes.tolist()), float(model.intercept_[0] - slopes @ mean))
