"""Measure contention: the time that requests in service lose to each other. Pure: `now` is an argument.

A request is in service from its first grant until it ends. If n requests are in service, each has 1/n of the machine.
It loses (n - 1) / n of its time to the others (processor sharing: Kleinrock 1967).

Lost time counts as a wait, like time in a queue. It is the time lost so far, plus the time that the request is going to
lose. The second part assumes that an answer needs `own_s` of the whole machine. If the deadline is far, a request can
bear some of it: SPARE of its whole time, less the target, does not count.

So contention shows load, not slowness. A request alone in service loses nothing, however long its answer takes. A
request whose whole time is less than the target never waits too long.
"""

from __future__ import annotations

from dataclasses import dataclass

SPARE = 0.5  # share of a request's time that may go to others
MEDIAN_STEP = 1.1  # factor by which one answer moves the median of answers' own time


@dataclass(slots=True)
class _InService:
    """One request's share of the machine."""

    since: float
    lost_before_s: float  # `Contention._lost_s` when this request started
    allowed_s: float
    is_paused: bool = False


class Contention:
    """Register the requests in service. Any hashable object stands for a request.

    `own_s` estimates how long an answer takes alone on the machine: the median of recent answers, 0.0 before the first.
    """

    def __init__(self, target_s: float, now: float = 0.0) -> None:
        self.own_s = 0.0
        self._target_s = target_s
        self._now = now
        self._lost_s = 0.0  # time that a request in service since the start would have lost
        self._in_service: dict[object, _InService] = {}
        self._paused = 0

    def __contains__(self, request: object) -> bool:
        return request in self._in_service

    def __len__(self) -> int:
        return len(self._in_service)

    @property
    def working(self) -> int:
        """Count the requests in service that do not wait for another request's result."""
        return len(self._in_service) - self._paused

    def start(self, request: object, now: float, allowed_s: float) -> None:
        """Register a request; a second call does nothing.

        `allowed_s` is the time from its arrival to its deadline, or infinity if it may wait for others.
        """
        self._pass_time(now)
        self._in_service.setdefault(request, _InService(now, self._lost_s, allowed_s))

    def pause(self, request: object) -> bool:
        """Record that the request waits for another request's result. Returns whether it was working until now."""
        share = self._in_service.get(request)
        if share is None or share.is_paused:
            return False
        share.is_paused = True
        self._paused += 1
        return True

    def resume(self, request: object) -> None:
        """End the request's pause, if it is paused."""
        share = self._in_service.get(request)
        if share is not None and share.is_paused:
            share.is_paused = False
            self._paused -= 1

    def end(self, request: object, now: float, *, answered: bool) -> float | None:
        """Remove a request -> the seconds that it was in service; None if it never was."""
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
        """Return the time of the request's first grant; None if it is not in service."""
        share = self._in_service.get(request)
        return None if share is None else share.since

    def waiting_since(self, now: float) -> float | None:
        """Return the arrival that would give the most delayed request the same wait in a queue.

        None if no request is delayed more than it can bear.
        """
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
