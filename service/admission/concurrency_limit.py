"""An AIMD concurrency limit on the requests in service, learned from missed deadlines. Pure: `now` is an argument.

Memory is not time. If every request that fits in memory is worked on at once, each may be so slow that all end too
late; then everything spent on them is lost. The limit starts as wide as there is room, and follows additive increase,
multiplicative decrease (Chiu and Jain 1989):

  - A miss narrows it to DECREASE times the requests being worked on: a request missed its deadline although it was in
    service at least as long as an answer takes by itself. Requests that were in service together narrow it only once.
    A request that gave itself less time than an answer takes says nothing about load.
  - Each answer widens it by its inverse, so by one for every full set of answers.

A paused request (it waits for what another one computes) leaves its room to that one, which may be outside. While the
limit is narrow, a request waits for its first grant no longer than PATIENCE of the time it came with (after Nichols and
Jacobson 2012, "Controlling queue delay"): later it would start with too little time left, and miss.
"""

from __future__ import annotations

import math

from service.admission.contention import Contention

DECREASE = 0.6
PATIENCE = 0.2
ONE_QUEUE_S = 2.0  # refusals at most this far apart count as one queue


class ConcurrencyLimit:
    """How many requests may be in service at once."""

    def __init__(self, widest: float = math.inf, contention: Contention | None = None) -> None:
        """`widest`: how many there is room for; infinity means no limit."""
        self.widest = widest
        self.width = widest
        self.contention = Contention(math.inf) if contention is None else contention
        self._narrowed_at = -math.inf
        self._refused_at = self._refusing_since = -math.inf

    @property
    def is_narrow(self) -> bool:
        return self.width < self.widest

    def allows(self, request: object) -> bool:
        """True for a request in service, for one that would be alone, and while there is room."""
        working = self.contention.working
        return not working or request in self.contention or working < self.width

    def end(self, request: object, now: float, *, answered: bool, missed: bool) -> None:
        """A request ended: with an answer, past its deadline (`missed`), or neither. Does nothing for a request that
        was never in service."""
        since, working = self.contention.since(request), self.contention.working
        served_s = self.contention.end(request, now, answered=answered)
        if since is None or served_s is None:
            return
        if answered:
            self.width = min(self.width + 1 / self.width, self.widest)
        elif missed and served_s >= self.contention.own_s and since >= self._narrowed_at and math.isfinite(self.widest):
            self.width = max(min(DECREASE * working, self.width), 1.0)
            self._narrowed_at = now

    def latest_start(self, arrived: float, deadline: float) -> float:
        """Until when a request that is not in service may wait for its first grant."""
        return arrived + PATIENCE * (deadline - arrived) if self.is_narrow else deadline

    def refused(self, arrived: float, now: float) -> None:
        """A request was refused because it would wait too long. Counts only while the limit is narrow."""
        if not self.is_narrow:
            return
        if now - self._refused_at > ONE_QUEUE_S:
            self._refusing_since = arrived
        self._refused_at = now

    def refusing_since(self, now: float) -> float | None:
        """Arrival of the first of the requests refused one after the other until now: in a queue it would still wait.
        None if none was refused lately."""
        return self._refusing_since if now - self._refused_at <= ONE_QUEUE_S else None
