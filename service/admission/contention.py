"""The requests in service, and what they lose to each other. Pure: `now` is an argument.

A request is in service from its first grant until it ends. Of n requests in service each has an n-th of the machine
and loses (n - 1) / n of its time to the others (processor sharing: Kleinrock 1967). What it has lost so far, and will
lose until it has had as much of the machine as answers take, is a wait like that in a queue. A request can bear some of
it while its deadline is far: SPARE of the time it came with, less the target, does not count.

This tells load from slowness. A request in service alone loses nothing, however long its answer takes. A request that
came with less time than the target never waits too long.
"""

from __future__ import annotations

from dataclasses import dataclass

SPARE = 0.5  # of a request's time may go to others
MEDIAN_STEP = 1.1  # one answer moves the median of answers' own time by this factor


@dataclass(slots=True)
class _InService:
    """One request's share of the machine."""

    since: float
    lost_before_s: float  # what a request in service from the beginning had lost when this one started
    allowed_s: float
    is_paused: bool = False


class Contention:
    """The one register of the requests in service, each named by any hashable object.

    `own_s` is the one estimate of how long an answer takes with the machine to itself: the median of late, 0.0 while
    nothing was answered.
    """

    def __init__(self, target_s: float, now: float = 0.0) -> None:
        self.own_s = 0.0
        self._target_s = target_s
        self._now = now
        self._lost_s = 0.0  # by a request in service from the beginning
        self._in_service: dict[object, _InService] = {}
        self._paused = 0

    def __contains__(self, request: object) -> bool:
        return request in self._in_service

    def __len__(self) -> int:
        return len(self._in_service)

    @property
    def working(self) -> int:
        """Requests in service that do not wait for what another one computes."""
        return len(self._in_service) - self._paused

    def start(self, request: object, now: float, allowed_s: float) -> None:
        """`allowed_s`: from its arrival to its deadline; infinite if it may wait for others. Does nothing the second
        time."""
        self._pass_time(now)
        self._in_service.setdefault(request, _InService(now, self._lost_s, allowed_s))

    def pause(self, request: object) -> bool:
        """It waits for what another one computes. Returns whether that was news."""
        share = self._in_service.get(request)
        if share is None or share.is_paused:
            return False
        share.is_paused = True
        self._paused += 1
        return True

    def resume(self, request: object) -> None:
        """Ends a pause; does nothing without one."""
        share = self._in_service.get(request)
        if share is not None and share.is_paused:
            share.is_paused = False
            self._paused -= 1

    def end(self, request: object, now: float, *, answered: bool) -> float | None:
        """Returns how many seconds it was in service; None if it never was."""
        self._pass_time(now)
        self.resume(request)
        share = self._in_service.pop(request, None)
        if share is None:
            return None
        served_s = now - share.since
        if answered:
            own_s = served_s - self._lost(share)
            if self.own_s:
                self.own_s *= MEDIAN_STEP if own_s > self.own_s else 1 / MEDIAN_STEP
            else:
                self.own_s = own_s
        return served_s

    def since(self, request: object) -> float | None:
        """When it was first granted something; None if it never was."""
        share = self._in_service.get(request)
        return None if share is None else share.since

    def waiting_since(self, now: float) -> float | None:
        """Equivalent arrival time of the most delayed request: in a queue it would have waited since then. None if
        no request is delayed more than it can bear."""
        self._pass_time(now)
        wait_s = max((self._wait_s(share) for share in self._in_service.values()), default=0.0)
        return now - wait_s if wait_s > 0 and len(self._in_service) > 1 else None

    def _wait_s(self, share: _InService) -> float:
        lost_s = self._lost(share)
        left_s = max(self.own_s - (self._now - share.since - lost_s), 0.0)
        loses_s = lost_s + left_s * (len(self._in_service) - 1)
        return min(loses_s, share.allowed_s) - max(SPARE * share.allowed_s - self._target_s, 0.0)

    def _lost(self, share: _InService) -> float:
        return self._lost_s - share.lost_before_s

    def _pass_time(self, now: float) -> None:
        if self._in_service:
            self._lost_s += (now - self._now) * (1 - 1 / len(self._in_service))
        self._now = now
