"""Measure how late the event loop is: how long a callback that is due waits for those that run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.01
IDLE_INTERVAL_S = 0.1  # while the loop has nothing to do: each measurement wakes the process
REST_S = 1.0  # while no request is there either
IDLE_SHARE = 0.05  # of a core: a loop that takes less in the last interval had nothing to do
REPORT_S = 0.1  # between two figures for the metric, each the worst since the last


class LoopLag:
    """Measure it while `watch` runs. A request that asks for it ends a rest."""

    def __init__(
        self, observe: Callable[[float], None], busy: Callable[[], bool], interval_s: float = INTERVAL_S
    ) -> None:
        """`busy` tells whether there are requests. Without them the watch rests, and nothing is observed."""
        self._observe = observe
        self._busy = busy
        self._interval_s = interval_s
        self._due = float("inf")
        self._last = 0.0
        self._asked = asyncio.Event()  # not set during a rest
        self._asked.set()

    @property
    def seconds(self) -> float:
        """The last measurement, or the one that is going on if it is worse already; 0 before `watch` runs."""
        now = time.monotonic()
        if not self._asked.is_set():
            self._asked.set()
            self._due = now  # the rest ends in the next turn of the loop
        return max(self._last, now - self._due)

    async def watch(self) -> None:
        """Run until cancelled."""
        reported, worst, idle = time.monotonic(), 0.0, False
        try:
            while True:
                started, worked = time.monotonic(), time.thread_time()
                rests = idle and not self._busy()
                if rests:
                    asked = await self._rest(started)
                else:
                    asked = await self._measure(started, IDLE_INTERVAL_S if idle else self._interval_s)
                now = time.monotonic()
                idle = not asked and time.thread_time() - worked < IDLE_SHARE * (now - started)
                self._last = max(0.0, now - self._due)
                worst = max(worst, self._last)
                if not rests and (now - reported >= REPORT_S or self._last >= REPORT_S):
                    self._observe(worst)
                    reported, worst = now, 0.0
        finally:
            self._asked.set()
            self._due, self._last = float("inf"), 0.0

    async def _measure(self, started: float, interval_s: float) -> bool:
        self._due = started + interval_s
        await asyncio.sleep(interval_s)
        return False

    async def _rest(self, started: float) -> bool:
        """Rest until a request asks -> True, or until REST_S are over -> False."""
        self._due = started + REST_S
        self._asked.clear()
        try:
            async with asyncio.timeout(REST_S):
                await self._asked.wait()
        except TimeoutError:
            self._asked.set()
            return False
        return True
