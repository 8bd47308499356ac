"""A circuit breaker. Its owner makes the trial that closes it again in the background, so no request waits for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FAILURES_TO_OPEN = 3  # in a row, on one connection: each has its own timeout, so one may fail where others do not
LEAST_PAUSE_S, MOST_PAUSE_S = 0.25, 2.0  # before a trial; a recovery is noticed after the longest pause at the latest
STEADY_S = 10.0  # once closed for this long, the pause starts at its least again


@dataclass(slots=True)
class Breaker:
    """Open until the first successful trial. Times are seconds of any one clock."""

    is_open: bool = True
    pause_s: float = 0.0  # before the next trial
    _failures: Counter[object] = field(default_factory=Counter)  # in a row, by connection
    _closed_at: float = 0.0

    def failed(self, now: float, connection: object = None) -> None:
        """Record that a call failed, or a trial while open."""
        self._failures[connection] += 1
        if self.is_open:
            self.pause_s = _longer(self.pause_s)
        elif self._failures[connection] >= FAILURES_TO_OPEN:
            self.is_open = True
            self.pause_s = LEAST_PAUSE_S if now - self._closed_at >= STEADY_S else _longer(self.pause_s)

    def succeeded(self, connection: object = None) -> None:
        """Record that a call succeeded. Only a trial closes an open breaker."""
        del self._failures[connection]

    def close(self, now: float) -> None:
        """Record that a trial succeeded."""
        self.is_open = False
        self._failures.clear()
        self._closed_at = now


def _longer(pause_s: float) -> float:
    return min(max(2 * pause_s, LEAST_PAUSE_S), MOST_PAUSE_S)
