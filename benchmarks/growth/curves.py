"""Define a curve: what is measured along an axis, at which sizes, and in which order the sizes are visited."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Figures = Mapping[str, float]  # by measure
Found = dict[int, list[Figures]]  # by size, then by round


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Costs along one axis, while every other size stays as it is."""

    axis: str
    name: str  # among the curves of its axis
    sizes: tuple[int, ...]  # ascending
    counted: str  # what a size counts
    holds: str  # which sizes stay, and at what
    causes: Mapping[str, int]  # by cost: 1 if it may grow with the size, 0 if it must not

    @property
    def key(self) -> tuple[str, str]:
        return self.axis, self.name


SomeCurve = TypeVar("SomeCurve", bound=Curve)


def steps(first: float, last: float, count: int) -> tuple[int, ...]:
    """Return up to `count` different whole numbers in geometric steps, both ends included."""
    ratio = (last / first) ** (1 / (count - 1))
    return tuple(sorted({round(first * ratio**step) for step in range(count)}))


def few(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the three smallest sizes, for a quick look at whether all works."""
    return tuple(sizes[:3])


def schedule(curves: Sequence[SomeCurve], rounds: int, seed: int) -> Iterator[tuple[SomeCurve, int]]:
    """Yield curve and size: axis by axis, and in each round of an axis all points of all its curves in random order.

    So a slow minute of the machine hits large and small sizes alike.
    """
    drawn = random.Random(seed)
    for axis in dict.fromkeys(curve.axis for curve in curves):
        points = [(curve, size) for curve in curves if curve.axis == axis for size in curve.sizes]
        for _ in range(rounds):
            yield from drawn.sample(points, len(points))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that has at least this share of all at or below it."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]
