"""How fast something comes free, observed while it was wanted: what a caller who must wait can be told."""

from __future__ import annotations

import math

WINDOW_S = 10.0  # what is older counts for less than 1/e
LEAST_S = 0.25  # of pressure, before the rate is believed


class Drain:
    """Units given back per second while somebody waited for them. Idle time says nothing of how fast we are.

    `now` is in seconds, of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self._pressed_since: float | None = None

    def observe(self, now: float, units: float, *, pressed: bool) -> None:
        """`units` came free; `pressed` says whether anything waits from now on."""
        if self._pressed_since is not None:
            elapsed = now - self._pressed_since
            fading = math.exp(-elapsed / WINDOW_S)
            self._units = self._units * fading + units
            self._seconds = self._seconds * fading + elapsed
        self._pressed_since = now if pressed else None

    def seconds_for(self, units: float) -> float:
        """Until so many units have come free; 0 where nothing is known yet."""
        if self._seconds < LEAST_S or not self._units:
            return 0.0
        return units * self._seconds / self._units
