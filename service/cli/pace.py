"""Limit how many requests a program has open at once, and back off when the service is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

NARROWING = 0.5  # of the width, at each refusal


class Stopped(Exception):
    """No more requests are started."""


class Pace:
    """Let threads take turns: at most `most` at once, fewer after refusals, none before a refusal's time is over.

    The width falls to half at each refusal and grows by one for each round of answers (AIMD), as TCP's does.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.width = float(most)
        self._open = 0
        self._resume_at = 0.0  # of the monotonic clock
        self._stopped = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and hold it for the block. Raises Stopped."""
        with self._changed:
            while not self._stopped and (wait_s := self._wait_s()) != 0:
                self._changed.wait(wait_s)
            if self._stopped:
                raise Stopped
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def answered(self) -> None:
        with self._changed:
            self.width = min(self.most, self.width + 1 / self.width)
            self._changed.notify_all()

    def refused(self, retry_after_s: float) -> None:
        """The service has no room for this time."""
        with self._changed:
            resume_at = time.monotonic() + retry_after_s
            if self._resume_at < time.monotonic():  # the first of those that were refused together
                self.width = max(1.0, self.width * NARROWING)
            self._resume_at = max(self._resume_at, resume_at)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def _wait_s(self) -> float | None:
        """Return 0 if there is a turn now, else how long to wait; None until something changes."""
        if (left_s := self._resume_at - time.monotonic()) > 0:
            return left_s
        return 0 if self._open < int(self.width) else None
