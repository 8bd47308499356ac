"""Keep requests from a Triton that fails, and have it tried again after a pause.

closed     requests pass. FAILURES_TO_OPEN failures in a row open it. Only a complete answer resets the count of streams
           that were cut short. A first token or a successful probe does not.
open       no request passes, and no success closes it until the pause is over.
half-open  no request passes. The next success, of a probe, closes it. A failure opens it again, with a longer pause.

If no Triton's breaker is closed, requests pass nevertheless: see `Group.pick` in service/upstreams/pool.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

FAILURES_TO_OPEN = 3  # in a row
LEAST_PAUSE_S, MOST_PAUSE_S = 0.5, 15.0
STEADY_S = 10.0  # once closed for so long, the pause starts at its least again
JITTER = 0.2  # of a pause, more or less, so that gateways do not try all at once


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """Count what calls found. Times are seconds of any one clock; `chance` is a random number from 0 to 1."""

    _failures: int = 0  # in a row
    _cut: int = 0  # streams in a row that failed after their first token
    _until: float | None = None  # when the pause is over; None while closed
    _pause_s: float = 0.0
    _closed_at: float = -math.inf

    def state(self, now: float) -> State:
        if self._until is None:
            return State.CLOSED
        return State.OPEN if now < self._until else State.HALF_OPEN

    def succeeded(self, now: float, *, is_whole: bool = True) -> None:
        """Record that a call succeeded. One that began before the breaker opened does not close it.

        Not `is_whole`: it is a probe, or the rest of the answer is still to come.
        """
        match self.state(now):
            case State.CLOSED:
                self._failures = 0
                self._cut = 0 if is_whole else self._cut
            case State.HALF_OPEN:
                self._failures, self._cut, self._until, self._closed_at = 0, 0, None, now

    def failed(self, now: float, chance: float = 0.5, *, is_cut: bool = False) -> None:
        """Record that a call failed. While open, calls that began before may still fail: they change nothing.

        `is_cut`: it is a stream that failed after its first token.
        """
        state = self.state(now)
        self._cut, self._failures = self._cut + is_cut, self._failures + (not is_cut)
        if state is State.OPEN or (state is State.CLOSED and self._failures + self._cut < FAILURES_TO_OPEN):
            return
        was_steady = state is State.CLOSED and now - self._closed_at >= STEADY_S
        self._pause_s = LEAST_PAUSE_S if was_steady else min(max(2 * self._pause_s, LEAST_PAUSE_S), MOST_PAUSE_S)
        self._until = now + self._pause_s * (1 - JITTER + 2 * JITTER * chance)
