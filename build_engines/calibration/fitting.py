"""Fit a Calibration: one regression each for a familiar image, a found object and a right answer.

Each is a logistic regression of a few signals (service/core/confidence.py), with scikit-learn's L2 penalty of 1 on
standardised signals. Every group of questions has a weight of its own, so that no split is calibrated at the cost of
another: their questions cannot be told apart when they are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from build_engines.calibration.asking import ABSENT, Outcome
from build_engines.scenes.held_out import PAIRS
from service.core.confidence import (
    FOUND_SIGNALS,
    RIGHT_SIGNALS,
    Calibration,
    Logistic,
    Words,
    found_signals,
    right_signals,
)

LEAST_SCALE = 1e-3  # of a feature's standard deviation
LEAST_QUESTIONS = 50  # right ones, and wrong ones
WEIGHTS: Mapping[str, float] = {PAIRS: 0.5}  # of a group's questions in the regression for a right answer; others: 1


class TooFew(Exception):
    """There is too little to fit. The message says what."""


@dataclass(slots=True)
class Material:
    """What a calibration is fitted on."""

    familiar: list[npt.NDArray[np.float32]] = field(default_factory=list)  # `summary` of each image
    foreign: list[npt.NDArray[np.float32]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


def fitted(material: Material, words: Words, about: Mapping[str, object]) -> Calibration:
    """Fit everything. Raises TooFew."""
    answered = [each for each in material.outcomes if each.task.group != ABSENT]
    right = sum(each.right for each in answered)
    if min(right, len(answered) - right) < LEAST_QUESTIONS:
        raise TooFew(
            f"{right} of {len(answered)} answers are right: ask questions with at least {LEAST_QUESTIONS} right and "
            f"{LEAST_QUESTIONS} wrong answers"
        )
    summaries = np.stack(material.familiar)
    centre = summaries.mean(0).astype(np.float32)
    scale = (summaries.std(0) + LEAST_SCALE).astype(np.float32)
    plain = Logistic((0.0,) * len(RIGHT_SIGNALS), 0.0)
    found = Logistic((0.0,) * len(FOUND_SIGNALS), 0.0)
    first = Calibration(centre, scale, Logistic((0.0,), 0.0), found, plain, words, {})
    fitted_on = dict(about) | {
        "images": len(material.familiar),
        "foreign_images": len(material.foreign),
        "questions": dict(Counter(each.task.group for each in material.outcomes)),
    }
    return replace(
        first,
        familiar=_familiar(strangeness(first, summaries), strangeness(first, np.array(material.foreign))),
        found=_found(material.outcomes, words),
        right=_right(answered),
        fitted_on=fitted_on,
    )


def strangeness(calibration: Calibration, summaries: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Of many images' summaries [n, 3 D] -> [n]; see Calibration.strangeness."""
    if not len(summaries):
        return np.zeros(0)
    away = (summaries - calibration.centre) / calibration.scale
    return np.log((away.astype(np.float64) ** 2).mean(1) + 1e-9)


def _familiar(own: npt.NDArray[np.float64], foreign: npt.NDArray[np.float64]) -> Logistic:
    """Weigh both kinds of images alike. Without foreign ones, take the calibration images' own spread."""
    if not len(foreign):
        width = max(float(own.std()), 1e-3)
        return Logistic((-4 / width,), 4 * float(own.mean() + 4 * width) / width)
    values = np.concatenate([own, foreign])[:, np.newaxis]
    return regression(values, np.arange(len(values)) < len(own), balanced=True)


def _found(outcomes: Sequence[Outcome], words: Words) -> Logistic:
    """Fit on questions that name something, or give no opinion if all of them name what is there."""
    named = [each for each in outcomes if each.task.found is not None]
    labels = np.array([bool(each.task.found) for each in named])
    if not named or labels.all() or not labels.any():
        return Logistic((0.0,) * len(FOUND_SIGNALS), 0.0 if not named else 4.0)
    return regression(np.array([found_signals(each.signals, words) for each in named]), labels)


def _right(outcomes: Sequence[Outcome]) -> Logistic:
    signals = np.array([right_signals(each.signals) for each in outcomes])
    weights = np.array([WEIGHTS.get(each.task.group, 1.0) for each in outcomes])
    return regression(signals, np.array([each.right for each in outcomes]), weights)


def regression(
    signals: npt.NDArray[np.floating],
    labels: npt.NDArray[np.bool_],
    weights: npt.NDArray[np.float64] | None = None,
    *,
    balanced: bool = False,
) -> Logistic:
    """Fit a logistic regression of signals [n, k], in the signals' own units."""
    mean, deviation = signals.mean(0), signals.std(0)
    deviation = np.where(deviation > 1e-9, deviation, 1.0)
    model = LogisticRegression(max_iter=1000, class_weight="balanced" if balanced else None)
    model.fit((signals - mean) / deviation, labels, sample_weight=weights)
    slopes = model.coef_[0] / deviation
    return Logistic(tuple(slopes.tolist()), float(model.intercept_[0] - slopes @ mean))
