"""Measure how fast units come free while requests wait for them, for Retry-After and estimates of queue time."""

from __future__ import annotations

import math

WINDOW_S = 10.0  # older observations count for less than 1/e
LEAST_S = 0.25  # shortest measurement that counts


class DrainRate:
    """Measure the units given back per second while a request waits for them. Idle time says nothing about speed.

    `now` is in seconds, of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self._wanted_since: float | None = None

    def observe(self, now: float, units: float, *, wanted: bool) -> None:
        """Record that `units` came free. `wanted` says whether a request waits from now on."""
        if self._wanted_since is not None:
            elapsed = now - self._wanted_since
            fading = math.exp(-elapsed / WINDOW_S)
            self._units = self._units * fading + units
            self._seconds = self._seconds * fading + elapsed
        self._wanted_since = now if wanted else None

    def seconds_for(self, units: float) -> float:
        """Estimate the seconds until this number of units has come free; 0 if nothing is known."""
        if self._seconds < LEAST_S or not self._units:
            return 0.0
        return units * self._seconds / self._units
