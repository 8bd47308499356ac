"""Choose the least loaded Triton of a group, and eject those that are much slower than the others.

**Choice**: of two Tritons drawn at random, the one with the smaller cost. A Triton's cost is its calls in flight plus
one, times its slowness ("the power of two choices").

**Slowness**: a Triton's time for a call divided by what the fast ones of the group take for calls of this kind, as an
exponentially weighted moving average (EWMA). It falls back towards 1 while a Triton gets no calls.

**Ejection**: a Triton whose slowness is SLOW times the median of the others gets no calls for a while, if its last call
took LEAST_EXCESS_S longer than is typical. At most MOST_EJECTED of a group is ejected, so that a load that makes all
slow ejects no more. Failures are the breaker's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

WEIGHT = 0.2  # of a new measurement in an average
RISING = 0.01  # likewise, of one above what is typical: a slow Triton must not make slowness typical
FORGET_S = 20.0  # without a call, slowness falls to 1 with this time constant
SLOW = 4.0
LEAST_EXCESS_S = 0.05  # by which a call must be slower than typical: fractions of a quick call are noise
LEAST_CALLS = 5  # that a Triton has answered before it can be ejected
MOST_EJECTED = 0.5  # share of a group
EJECTION_S, MOST_EJECTION_S = 5.0, 60.0  # the first time; each further one is longer by as much
FORGIVEN_S = 300.0  # after an ejection: the next one counts as the first

Draw = Callable[[int], int]  # a random number from 0 up to, without, its argument


@dataclass(slots=True, eq=False)
class Load:
    """What is known of one Triton. Times are seconds of any one clock."""

    in_flight: int = 0
    calls: int = 0  # answered, since the last ejection
    ejections: int = 0
    ejected_until: float = -math.inf
    _slowness: float = 1.0
    _measured: float = -math.inf

    def slowness(self, now: float) -> float:
        return 1 + (self._slowness - 1) * math.exp(-max(0.0, now - self._measured) / FORGET_S)

    def measure(self, ratio: float, now: float) -> None:
        self._slowness = (1 - WEIGHT) * self.slowness(now) + WEIGHT * ratio
        self._measured = now
        self.calls += 1

    def cost(self, now: float) -> float:
        """A fast one costs as much as any other: else a lead in noise would give it all calls of a quiet service."""
        return (self.in_flight + 1) * max(1.0, self.slowness(now))

    def is_ejected(self, now: float) -> bool:
        return now < self.ejected_until

    def eject(self, now: float) -> None:
        self.ejections = 1 if now > self.ejected_until + FORGIVEN_S else self.ejections + 1
        self.ejected_until = now + min(self.ejections * EJECTION_S, MOST_EJECTION_S)
        self.calls, self._slowness = 0, 1.0


@dataclass(slots=True)
class Balance:
    """Balance the calls of one group of Tritons."""

    loads: list[Load] = field(default_factory=list)
    _typical: dict[str, float] = field(default_factory=dict)  # seconds by kind of call

    def choose(self, usable: Sequence[Load], now: float, draw: Draw) -> Load:
        """Return the load of the Triton that gets the next call. `usable` are not empty: those whose breaker allows.

        If all of these are ejected, they are used nevertheless.
        """
        found = [load for load in usable if not load.is_ejected(now)] or list(usable)
        one = draw(len(found))
        other = draw(len(found) - 1) if len(found) > 1 else one
        other += other >= one and len(found) > 1
        return min(found[one], found[other], key=lambda load: load.cost(now))

    def measured(self, load: Load, kind: str, seconds: float, now: float) -> None:
        """Record how long a call took, and eject its Triton if it is an outlier."""
        typical = self._typical.setdefault(kind, seconds)
        load.measure(seconds / max(typical, 1e-6), now)
        if not load.is_ejected(now):
            weight = RISING if seconds > typical else WEIGHT
            self._typical[kind] = (1 - weight) * typical + weight * seconds
        if seconds - typical >= LEAST_EXCESS_S and self._is_outlier(load, now):
            load.eject(now)

    def _is_outlier(self, load: Load, now: float) -> bool:
        others = [each for each in self.loads if each is not load and not each.is_ejected(now)]
        if load.calls < LEAST_CALLS or load.is_ejected(now) or not others:
            return False
        ejected = sum(each.is_ejected(now) for each in self.loads)
        if ejected + 1 > MOST_EJECTED * len(self.loads):
            return False
        return load.slowness(now) > SLOW * median(each.slowness(now) for each in others)
