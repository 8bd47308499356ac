"""Add up the time that the model calls of one attempt take before its first token."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class AttemptTime:
    """The time spent in calls, in seconds of any one clock. Calls at the same moment count once.

    The gateway's own queue does not count: any other Triton or variant would be waited for in the same queue.
    """

    _seconds: float = 0.0
    _inside: int = 0
    _since: float = 0.0

    def spent_s(self, now: float) -> float:
        return self._seconds + (now - self._since if self._inside else 0.0)

    def enter(self, now: float) -> None:
        """Begin a call."""
        if not self._inside:
            self._since = now
        self._inside += 1

    def leave(self, now: float) -> None:
        """End a call."""
        self._inside -= 1
        if not self._inside:
            self._seconds += now - self._since

    def begin_anew(self, now: float) -> None:
        """Forget what was spent: another Triton gets the call."""
        self._seconds, self._since = 0.0, now


current: ContextVar[AttemptTime | None] = ContextVar("time of the current attempt", default=None)


def begin_attempt() -> None:
    """Measure the later calls of this context, and of the tasks that it starts, as those of one attempt."""
    current.set(AttemptTime())


def attempt_time() -> AttemptTime:
    """Return the time of this context's attempt; a call outside of one is an attempt of its own."""
    return current.get() or AttemptTime()
