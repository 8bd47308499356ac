"""How closely requests may look under load: less, before anybody is refused or answered too late. Pure: `now` is an
argument.

Watched is the longest wait there is at a moment, in any queue. What it is over the target adds up: twice the target for
STEP_S is one level up, unless the queue is on its way back. Under CALM of the target for a while is one level down.

Where all are let in nobody waits in a queue, and yet each waits for the others: of n that are worked on side by side
one is given an n-th of the machine and loses (n - 1) / n of its time to them (processor sharing: Kleinrock 1967). What
it has lost, and will lose until it had as much to itself as answers take, is a wait like any other, but for one thing:
a request can bear it while its deadline is far. So it counts less what it can bear, which leaves the target where SPARE
of the time that the request came with is lost.

That tells load from slowness: who is alone loses nothing, however long its answer takes, and rows of a batch that slow
each other down little need little for themselves. And who came with less time than the target never waits for longer.

The way down is a trial, as nobody knows how long the queue would be at a level that is not in force. Where it has to be
taken back within TRIAL_S the next one to that level, or below, waits four times as long, MOST_HOLD_S at the most. So
under a load between what two levels can bear the controller settles at the higher one, with a short trial now and then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.core.request import Budget

STEP_S = 1.0  # between two changes of level, at the least
CALM = 0.25
SOON_S = 5.0  # a queue that will be at the target in this time, if it goes on shrinking, is on its way
LEAST_HOLD_S, MOST_HOLD_S = 5.0, 40.0
TRIAL_S = 60.0  # then a trial has not failed
SPARE = 0.5  # of a request's time may go to others
MEDIAN_STEP = 1.1  # by one answer, of how much of the machine's time answers take


@dataclass(frozen=True, slots=True)
class Level:
    """The most that a request may get; what it asks for at the least it gets anyway."""

    vision_tokens: int
    visual_tokens: int
    closer_view: bool  # whether the 448-pixel view may be encoded

    def cap(self, budget: Budget) -> Budget:
        return replace(
            budget,
            vision_tokens=_capped(budget.vision_tokens, self.vision_tokens),
            visual_tokens=_capped(budget.visual_tokens, self.visual_tokens),
        )


def _capped(budget: tuple[int, int], most: int) -> tuple[int, int]:
    return budget[0], max(budget[0], min(budget[1], most))


LEVELS = (
    Level(400, 128, closer_view=True),
    Level(192, 96, closer_view=True),
    Level(128, 64, closer_view=False),
    Level(96, 32, closer_view=False),
    Level(64, 32, closer_view=False),
)


class Fidelity:
    """The level in force. Times are seconds of any clock that does not go back; a target of infinity is level 0."""

    def __init__(self, target_s: float, now: float) -> None:
        self.level = 0
        self._target_s = target_s
        self._now = now
        self._since: float | None = None  # when who waits longest came; None: nobody waits
        self._calm_since: float | None = now
        self._excess = 0.0  # seconds, times how often the target the wait is over it
        self._mark = (now, 0.0)  # a moment, and the longest wait then
        self._changed_at, self._lowered = now, False
        self._told_at = now - STEP_S
        self._hold_s = [LEAST_HOLD_S] * len(LEVELS)  # of calm, before that level is tried

    def observe(self, now: float, waiting_since: float | None) -> int:
        """The level from now on. Who waits longest of all came at `waiting_since`; None: nobody waits."""
        before = self.level
        self._pass_time(now)
        self._since = waiting_since
        wait_s = 0.0 if waiting_since is None else now - waiting_since
        if wait_s > CALM * self._target_s:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        if wait_s < self._target_s:
            self._excess, self._mark = 0.0, (now, self._target_s)
        if self.level != before:
            self._told_at = now
        return self.level

    def _pass_time(self, now: float) -> None:
        """What came about until `now`, while the same one waited."""
        restless = now if self._since is None else self._since + CALM * self._target_s
        if now - self._told_at >= STEP_S:
            self._lower(min(now, restless))
        if restless < now:
            self._calm_since = None
        if self._since is not None and (wait_s := now - self._since) > self._target_s:
            was_s = max(self._now - self._since, self._target_s)
            self._excess += (wait_s - was_s) * ((was_s + wait_s) / 2 / self._target_s - 1)
            if self._excess >= STEP_S and now - self._told_at >= STEP_S:
                self._check(now, wait_s)
        self._now = now

    def _lower(self, now: float) -> None:
        while self.level and self._calm_since is not None:
            at = max(self._calm_since, self._changed_at) + self._hold_s[self.level - 1]
            if at > now:
                return
            self._change(self.level - 1, at)

    def _check(self, now: float, wait_s: float) -> None:
        marked_at, marked_s = self._mark
        self._excess, self._mark = 0.0, (now, wait_s)
        on_its_way = (marked_s - wait_s) * SOON_S > (wait_s - self._target_s) * (now - marked_at)
        if on_its_way or self.level == len(LEVELS) - 1:
            return
        if self._lowered:
            self._judge(failed=now - self._changed_at < TRIAL_S)
        self._change(self.level + 1, now)

    def _judge(self, failed: bool) -> None:
        """What this level cannot bear none below it can; what it can bear all above it can."""
        if failed:
            longer_s = min(4 * self._hold_s[self.level], MOST_HOLD_S)
            self._hold_s[: self.level + 1] = [longer_s] * (self.level + 1)
        else:
            self._hold_s[self.level :] = [LEAST_HOLD_S] * (len(LEVELS) - self.level)

    def _change(self, level: int, at: float) -> None:
        self._lowered = level < self.level
        self.level, self._changed_at = level, at


@dataclass(slots=True)
class _Share:
    """What one request had of the machine."""

    entered: float
    lost_before_s: float  # what one that was there all the time had lost by then
    allowed_s: float


class Crowd:
    """Requests that are worked on side by side, by any object that stands for one, and what they lose to each other."""

    def __init__(self, target_s: float, now: float) -> None:
        self._target_s = target_s
        self._now = now
        self._lost_s = 0.0  # by one that was there all the time
        self._own_s = 0.0  # about the median of what an answer takes for itself; 0: not known yet
        self._inside: dict[object, _Share] = {}

    def enter(self, request: object, now: float, allowed_s: float) -> None:
        """`allowed_s`: from its arrival to its deadline; infinite: it may wait for the others. Who is inside stays."""
        self._pass_time(now)
        self._inside.setdefault(request, _Share(now, self._lost_s, allowed_s))

    def leave(self, request: object, now: float, *, answered: bool) -> None:
        self._pass_time(now)
        share = self._inside.pop(request, None)
        if share is None or not answered:
            return
        own_s = now - share.entered - self._lost(share)
        if self._own_s:
            self._own_s *= MEDIAN_STEP if own_s > self._own_s else 1 / MEDIAN_STEP
        else:
            self._own_s = own_s

    def waiting_since(self, now: float) -> float | None:
        """When the one that waits most for the others would have come to a queue to wait as long; None: nobody does."""
        self._pass_time(now)
        wait_s = max((self._wait_s(share) for share in self._inside.values()), default=0.0)
        return now - wait_s if wait_s > 0 and len(self._inside) > 1 else None

    def _wait_s(self, share: _Share) -> float:
        lost_s = self._lost(share)
        left_s = max(self._own_s - (self._now - share.entered - lost_s), 0.0)
        loses_s = lost_s + left_s * (len(self._inside) - 1)
        return min(loses_s, share.allowed_s) - max(SPARE * share.allowed_s - self._target_s, 0.0)

    def _lost(self, share: _Share) -> float:
        return self._lost_s - share.lost_before_s

    def _pass_time(self, now: float) -> None:
        if self._inside:
            self._lost_s += (now - self._now) * (1 - 1 / len(self._inside))
        self._now = now
