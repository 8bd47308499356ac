"""Make calibrations by hand, whose answers depend on one signal each in a known way."""

from __future__ import annotations

import numpy as np

from service.core.confidence import FOUND_SIGNALS, RIGHT_SIGNALS, Calibration, Logistic, Words


def calibrated(vision_width: int, *, several: bool = False) -> Calibration:
    """Be familiar with strangeness below 2, find what has a peak above .5, and be right about 9 times in 10.

    `several` adds what clips and several images are judged by: the LLM's own log odds, and one less for a clip.
    """
    found = dict.fromkeys(FOUND_SIGNALS, 0.0) | {"peak": 2.0, "denied": -2.0, "affirmed": 2.0}
    right = dict.fromkeys(RIGHT_SIGNALS, 0.0) | {"log_odds": 1.0, "log_familiar": 1.0, "log_found": 2.0}
    return Calibration(
        centre=np.zeros(3 * vision_width, np.float32),
        scale=np.ones(3 * vision_width, np.float32),
        familiar=Logistic((-4.0,), 8.0),
        found=Logistic(tuple(found.values()), 0.0),
        right=Logistic(tuple(right.values()), 0.5),
        words=Words(frozenset({"star", "red"}), ("is there", "how many"), frozenset({"no", "0"})),
        several=Logistic((1.0, 0.0, -1.0, 0.0), 0.0) if several else None,
        fitted_on={"images": 10, "foreign_images": 2, "questions": {"new": 80}},
    )
