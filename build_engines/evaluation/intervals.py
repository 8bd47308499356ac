"""95 % intervals of shares of independent cases (Wilson), and of shares, means and differences by scene (bootstrap).

Questions about one scene are not independent, so the bootstrap draws scenes (Davison and Hinkley 1997, section 3.8). A
difference between arms is the mean of the differences per question. Effects that both arms share therefore cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964  # standard normal quantile of 0.975
DRAWS = 4000
LEAST_DRAWS = 500
MOST_DRAWN = 20_000_000  # numbers of draws times scenes: 160 MB
ENDS = (0.025, 0.975)

Numbers = npt.NDArray[np.float64]


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion of independent cases. Source: Wilson 1927."""
    share, square = right / of, Z_95**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = Z_95 * math.sqrt(share * (1 - share) / of + square / (4 * of * of)) / (1 + square / of)
    return max(0.0, centre - half), min(1.0, centre + half)


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


def share_by_scene(
    right: Sequence[bool] | npt.NDArray[np.bool_], scenes: Sequence[Hashable] | npt.NDArray[Any]
) -> Figure:
    """Share of right answers [n], each about one of `scenes` [n].

    If all answers are alike, draws cannot tell how sure that is: the interval is then Wilson's, over the scenes.
    """
    numbers = {each: number for number, each in enumerate(dict.fromkeys(scenes))}
    found = mean(right, np.array([numbers[each] for each in scenes]))
    assert found is not None
    if found.value in (0.0, 1.0):
        return Figure(found.value, *wilson(round(found.value) * len(numbers), len(numbers)))
    return found


def mean(values: npt.ArrayLike, scene: npt.NDArray[np.int64]) -> Figure | None:
    """Mean of values or differences [n], each for a question about scene [n]; None for no values."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return None
    return Figure(float(numbers.mean()), *np.quantile(_drawn_means(numbers, scene), ENDS).tolist())


def of_images(totals: Numbers, statistic: Callable[[Numbers], Numbers]) -> list[Figure]:
    """Figures of sums over images, such as a mean (sum of scores by sum of questions) or a corpus's BLEU.

    totals [images, k]: what each image adds to the k sums. statistic: sums [..., k] -> m figures [..., m].
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(totals.sum(0))
        low, high = np.nanquantile(statistic(_draws(len(totals)) @ totals), ENDS, axis=0)
    return [Figure(*map(float, each)) for each in zip(values, low, high, strict=True)]


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
    """[draws]: the mean in each draw. A draw takes `scenes` scenes with replacement."""
    number = int(scene.max()) + 1 if scenes is None else scenes
    weights = _draws(number)
    total = weights @ np.bincount(scene, values, number)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / (weights @ np.bincount(scene, minlength=number))


@lru_cache(maxsize=8)
def _draws(scenes: int) -> Numbers:
    """[DRAWS, scenes]: how often each scene is drawn. All arms share the draws, which pairs them.

    Above 5,000 scenes there are fewer draws.
    """
    generator = np.random.default_rng(0)
    draws = max(LEAST_DRAWS, min(DRAWS, MOST_DRAWN // scenes))
    return generator.multinomial(scenes, np.full(scenes, 1 / scenes), draws).astype(np.float64)
