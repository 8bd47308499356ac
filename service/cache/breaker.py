"""A circuit breaker that no request pays for: the trial that closes it again is the owner's, in the background."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_TO_OPEN = 3  # in a row
LEAST_PAUSE_S, MOST_PAUSE_S = 0.25, 5.0  # before a trial; the latter is how late a recovery is noticed at most
STEADY_S = 10.0  # closed for as long, and the next opening counts as the first


@dataclass(slots=True)
class Breaker:
    """Open at first: what was never reached is not worth waiting for. Times are seconds of any one clock."""

    is_open: bool = True
    pause_s: float = 0.0  # before the next trial
    _failures: int = 0
    _closed_at: float = 0.0

    def failed(self, now: float) -> None:
        """A call failed, or a trial while open."""
        self._failures += 1
        if self.is_open:
            self.pause_s = _longer(self.pause_s)
        elif self._failures >= FAILURES_TO_OPEN:
            self.is_open = True
            self.pause_s = LEAST_PAUSE_S if now - self._closed_at >= STEADY_S else _longer(self.pause_s)

    def succeeded(self) -> None:
        """A call went well. One that was under way when the breaker opened does not close it: a trial does."""
        self._failures = 0

    def close(self, now: float) -> None:
        """A trial went well."""
        self.is_open = False
        self._failures = 0
        self._closed_at = now


def _longer(pause_s: float) -> float:
    return min(max(2 * pause_s, LEAST_PAUSE_S), MOST_PAUSE_S)
