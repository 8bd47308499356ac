"""Measure how late the event loop is: how long a callback that is due waits for those that run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.01
IDLE_INTERVAL_S = 0.1  # while the loop has nothing to do: each measurement wakes the process
IDLE_SHARE = 0.05  # of a core: a loop that takes less in the last interval had nothing to do
REPORT_S = 0.1  # between two figures for the metric, each the worst since the last


class LoopLag:
    """Measure it while `watch` runs."""

    def __init__(self, observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
        self._observe = observe
        self._interval_s = interval_s
        self._due = float("inf")
        self._last = 0.0

    @property
    def seconds(self) -> float:
        """The last measurement, or the one that is going on if it is worse already; 0 before `watch` runs."""
        return max(self._last, time.monotonic() - self._due)

    async def watch(self) -> None:
        """Run until cancelled."""
        reported, worst = time.monotonic(), 0.0
        interval_s = self._interval_s
        try:
            while True:
                started, worked = time.monotonic(), time.thread_time()
                self._due = started + interval_s
                await asyncio.sleep(interval_s)
                now = time.monotonic()
                idle = time.thread_time() - worked < IDLE_SHARE * (now - started)
                interval_s = max(self._interval_s, IDLE_INTERVAL_S) if idle else self._interval_s
                self._last = max(0.0, now - self._due)
                worst = max(worst, self._last)
                if now - reported >= REPORT_S or self._last >= REPORT_S:
                    self._observe(worst)
                    reported, worst = now, 0.0
        finally:
            self._due, self._last = float("inf"), 0.0
