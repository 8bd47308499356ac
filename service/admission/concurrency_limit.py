"""Limit the requests in service: an AIMD concurrency limit, learned from missed deadlines.

Pure: `now` is an argument.

Memory is not time. If all requests that fit in memory run at once, each may be so slow that all end too late. Then all
work on them is lost. The limit starts at its widest and follows additive increase, multiplicative decrease (Chiu and
Jain 1989):

  - A miss narrows the limit to DECREASE times the working requests. A miss is a request that passed its deadline,
    although it was in service at least as long as an answer takes alone. (A shorter timeout says nothing about load.)
    Requests that were in service at the same time narrow the limit only once.
  - An answer widens a limit of n by 1/n, so n answers widen it by one.

A paused request (it waits for another request's result) does not count, so that the other one can start. While the
limit is narrow, a request's first grant must come within PATIENCE of its whole time (after Nichols and Jacobson 2012,
"Controlling queue delay"). After a longer wait it would start with too little time left, and miss its deadline.

`glimpse bench --scenario overload` compares the service with and without it.
"""

from __future__ import annotations

import math

from service.admission.contention import Contention

DECREASE = 0.6
PATIENCE = 0.2
ONE_QUEUE_S = 2.0  # refusals at most this far apart count as one queue


class ConcurrencyLimit:
    """Decide how many requests may be in service at once."""

    def __init__(self, widest: float = math.inf, contention: Contention | None = None) -> None:
        """`widest`: the most requests that have room; infinity means no limit."""
        self.widest = widest
        self.width = widest
        self.contention = Contention(math.inf) if contention is None else contention
        self._narrowed_at = -math.inf
        self._refused_at = self._refusing_since = -math.inf

    @property
    def is_narrow(self) -> bool:
        return self.width < self.widest

    def allows(self, request: object) -> bool:
        """Return whether the request may start: it is in service already, it would be alone, or there is room."""
        working = self.contention.working
        return not working or request in self.contention or working < self.width

    def end(self, request: object, now: float, *, answered: bool, missed: bool) -> None:
        """Record that a request ended: with an answer, past its deadline (`missed`), or neither.

        It does nothing for a request that was never in service.
        """
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
        """Return the latest time at which a request that is not in service may get its first grant."""
        return arrived + PATIENCE * (deadline - arrived) if self.is_narrow else deadline

    def refused(self, arrived: float, now: float) -> None:
        """Record a refusal because of too long a wait. It counts only while the limit is narrow."""
        if not self.is_narrow:
            return
        if now - self._refused_at > ONE_QUEUE_S:
            self._refusing_since = arrived
        self._refused_at = now

    def refusing_since(self, now: float) -> float | None:
        """Return the arrival of the first request of the current series of refusals; None if there is no such series.

        A series has gaps of at most ONE_QUEUE_S. If its first request had stayed in the queue, it would still wait.
        """
        return self._refusing_since if now - self._refused_at <= ONE_QUEUE_S else None
