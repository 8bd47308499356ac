"""95 % intervals of shares (Wilson), and of means and differences over scenes (bootstrap).

Questions about one scene are not independent, so the bootstrap draws scenes (Davison and Hinkley 1997, section 3.8). A
difference between arms is the mean of the differences per question. Effects that both arms share therefore cancel out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from build_engines.evaluation.accuracy import wilson

DRAWS = 4000
ENDS = (0.025, 0.975)

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self, digits: int = 4) -> dict[str, float]:
        return {"value": round(self.value, digits), "low": round(self.low, digits), "high": round(self.high, digits)}


def share(right: npt.NDArray[np.bool_]) -> Figure | None:
    """Share of right answers among questions [n]; None for no questions."""
    if not len(right):
        return None
    return Figure(float(right.mean()), *wilson(int(right.sum()), len(right)))


def mean(values: npt.ArrayLike, scene: npt.NDArray[np.int64]) -> Figure | None:
    """Mean of values or differences [n], each for a question about scene [n]; None for no values."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return None
    return Figure(float(numbers.mean()), *np.quantile(_drawn_means(numbers, scene), ENDS).tolist())


def difference_of_groups(
    values: npt.ArrayLike, ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], scene: npt.NDArray[np.int64]
) -> Figure | None:
    """Mean of the values [n] in one group of questions minus that in another.

    Both groups use the same draws of scenes. None if a group is empty.
    """
    numbers = np.asarray(values, np.float64)
    if not (ours.any() and theirs.any()):
        return None
    scenes = int(scene.max()) + 1
    drawn = _drawn_means(numbers[ours], scene[ours], scenes) - _drawn_means(numbers[theirs], scene[theirs], scenes)
    value = float(numbers[ours].mean() - numbers[theirs].mean())
    return Figure(value, *np.nanquantile(drawn, ENDS).tolist())


def median(values: npt.ArrayLike) -> Figure:
    """Median of independent values [n], with the interval of their order statistics.

    Source: Hollander and Wolfe 1999, chapter 3.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    reach = 1.959964 * np.sqrt(len(ordered)) / 2
    low = max(0, int(np.floor(len(ordered) / 2 - reach)))
    high = min(len(ordered) - 1, int(np.ceil(len(ordered) / 2 + reach)))
    return Figure(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))


def _drawn_means(values: Numbers, scene: npt.NDArray[np.int64], scenes: int | None = None) -> Numbers:
    """[DRAWS]: the mean in each draw. A draw takes `scenes` scenes with replacement."""
    number = int(scene.max()) + 1 if scenes is None else scenes
    weights = _draws(number)
    total = weights @ np.bincount(scene, values, number)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / (weights @ np.bincount(scene, minlength=number))


@lru_cache(maxsize=8)
def _draws(scenes: int) -> Numbers:
    """[DRAWS, scenes]: how often each scene is drawn. All arms share the draws, which pairs them."""
    generator = np.random.default_rng(0)
    return generator.multinomial(scenes, np.full(scenes, 1 / scenes), DRAWS).astype(np.float64)
