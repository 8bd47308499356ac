"""Fit the order of growth of a cost: the slope of its logarithm against that of the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 2000  # of the bootstrap
LEAST_ROUNDS = 5  # of a bootstrap; fewer have a few different draws only
MARGIN = 0.15  # a slope this near to 0 or 1 counts as that
# A table of more entries misses the CPU's caches more often, and a sorted one takes a logarithm longer.
CONSTANT_MARGIN = 0.35


@dataclass(frozen=True, slots=True)
class Order:
    """A slope of 0 is a constant cost, 1 a linear one.

    `low` and `high` are its 95 % interval, or the range of the rounds' slopes if those are too few for an interval.
    """

    slope: float
    low: float
    high: float
    is_range: bool = False

    @property
    def word(self) -> str:
        """Say what the interval allows."""
        if self.slope > 1 + MARGIN and self.low > 1:
            return "faster than linear"
        least, most = _word(self.low), _word(self.high)
        return least if least == most else f"{least} to {most}"

    def is_faster_than(self, cause: int) -> bool:
        """Whether the cost surely grows faster than its cause: 1 grows with the size, 0 does not."""
        return self.slope > cause + (MARGIN if cause else CONSTANT_MARGIN) and self.low > cause


def _word(slope: float) -> str:
    if slope <= MARGIN:
        return "constant"
    return "below linear" if slope < 1 - MARGIN else "linear"


def fitted(sizes: Sequence[int], costs: Sequence[Sequence[float]]) -> Order:
    """Fit the upper half of the sizes, where what a request costs at any size matters least.

    `costs` has one row a size, of one cost a round. The interval is that of the rounds, drawn whole (bootstrap): a slow
    moment of the machine hits all sizes of a round. Fewer than LEAST_ROUNDS have the range of their slopes instead.
    """
    half = min(len(sizes) // 2, len(sizes) - 2)
    logs = np.log(np.array(costs[half:], float))
    across = np.log(np.array(sizes[half:], float))
    rounds = logs.shape[1]
    (slope,) = _slopes(across, np.median(logs, axis=1, keepdims=True))
    if is_range := rounds < LEAST_ROUNDS:
        each = _slopes(across, logs)
        low, high = min(*each, slope), max(*each, slope)
    else:
        drawn = np.random.default_rng(0).integers(0, rounds, (DRAWS, rounds))
        low, high = np.percentile(_slopes(across, np.median(logs[:, drawn], axis=2)), [2.5, 97.5])
    return Order(round(float(slope), 3), round(float(low), 3), round(float(high), 3), is_range)


def _slopes(across: npt.NDArray[np.float64], costs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares. Costs [sizes, draws] -> [draws]."""
    centred = across - across.mean()
    found: npt.NDArray[np.float64] = centred @ costs / (centred @ centred)
    return found
