"""How many requests are worked on at once, learned from those that missed their deadline. Pure: `now` is an argument.

Memory is not time. Where all requests that fit are worked on together and each so slowly that all end too late, what
was spent on them is lost, and then on the next: nobody is answered. So the window begins as wide as there is room, and

  - a request that was worked on, at least as long as answers have taken of late, and missed its deadline narrows it to
    NARROWED of those that are worked on, if that is less, at most once among those that were worked on together; one
    that gave itself less time says nothing of us,
  - each that is answered widens it by its inverse: by one, when as many were answered as it lets in

(additive increase, multiplicative decrease: Chiu and Jain 1989). Who is inside and waits for what another request
brings rests, and leaves its room to that one, who may be outside. While the window is narrow nobody waits for a first
turn longer than PATIENCE of the time it came with (after Nichols and Jacobson 2012, "Controlling queue delay"): who
waited long would start with too little time left, and miss it.
"""

from __future__ import annotations

import math

NARROWED = 0.6
PATIENCE = 0.2
LATELY = 0.1  # weight of one answer in how long answers take
ONE_QUEUE_S = 2.0  # between two who are turned away, at the most, where they would have stood in one queue


class Window:
    """Requests, by any object that stands for one, from the first work on them to their end."""

    def __init__(self, widest: float = math.inf) -> None:
        """widest: how many there is room for; infinite: it is never narrow."""
        self.widest = widest
        self.width = widest
        self._since: dict[object, float] = {}
        self._resting: set[object] = set()  # of those inside
        self._narrowed_at = -math.inf
        self._usual_s = 0.0
        self._turned_away_at = self._kept_out_since = -math.inf

    @property
    def is_narrow(self) -> bool:
        return self.width < self.widest

    @property
    def inside(self) -> int:
        return len(self._since)

    @property
    def _working(self) -> int:
        return self.inside - len(self._resting)

    def lets_in(self, request: object | None) -> bool:
        """Whoever is inside, and whoever is alone. None stands for a request that nobody asks about again."""
        return not self._working or request in self._since or self._working < self.width

    def holds(self, request: object | None) -> bool:
        return request in self._since

    def enter(self, request: object | None, now: float) -> None:
        if request is not None:
            self._since.setdefault(request, now)

    def rest(self, request: object) -> bool:
        """It waits for what another brings; whether that makes room. What is claimed for it is work again."""
        makes_room = request in self._since and request not in self._resting
        if makes_room:
            self._resting.add(request)
        return makes_room

    def work(self, request: object) -> None:
        self._resting.discard(request)

    def leave(self, request: object, now: float, *, answered: bool, missed: bool) -> None:
        """Its end: with an answer, past its deadline, or neither. Does nothing for a request that never was inside."""
        since = self._since.get(request)
        if since is None:
            return
        held_s = now - since
        if answered:
            self._usual_s += (held_s - self._usual_s) * (LATELY if self._usual_s else 1.0)
            self.width = min(self.width + 1 / self.width, self.widest)
        elif missed and held_s >= self._usual_s and since >= self._narrowed_at and math.isfinite(self.widest):
            self.width = max(min(NARROWED * self._working, self.width), 1.0)
            self._narrowed_at = now
        del self._since[request]
        self._resting.discard(request)

    def latest_start(self, arrived: float, deadline: float) -> float:
        """Of who is not inside: until when it waits."""
        return arrived + PATIENCE * (deadline - arrived) if self.is_narrow else deadline

    def turn_away(self, arrived: float, now: float) -> None:
        """Somebody who would have had to wait for too long. Counts while it is narrow."""
        if not self.is_narrow:
            return
        if now - self._turned_away_at > ONE_QUEUE_S:
            self._kept_out_since = arrived
        self._turned_away_at = now

    def kept_out_since(self, now: float) -> float | None:
        """When the first of those came that are turned away one after the other, to this day: so long would be the
        wait, did anybody wait. None: nobody is."""
        return self._kept_out_since if now - self._turned_away_at <= ONE_QUEUE_S else None
