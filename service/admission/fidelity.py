"""Set how closely requests look under load, so that fewer are refused or late. Pure: `now` is an argument.

The controller watches the longest wait at each moment: in a queue, or by contention (`contention.py`). It sums the
excess over the target. A wait of twice the target for STEP_S raises the level by one, unless the queue already shrinks
fast enough. A wait below CALM of the target for some seconds lowers it by one.

Each lowering is a trial, because the queue's length at another level is unknown. A trial fails if the level has to rise
again within TRIAL_S. The next trial of that level or a lower one then waits four times as long, at most MOST_HOLD_S. If
the load is too much for one level but not for the next, the controller stays at the higher one, with short trials.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.core.request import Budget

STEP_S = 1.0  # least time between two changes of level
CALM = 0.25
SOON_S = 5.0  # a queue shrinks fast enough if, at its present rate, it reaches the target within this time
LEAST_HOLD_S, MOST_HOLD_S = 5.0, 40.0
TRIAL_S = 60.0  # a trial that lasts this long has succeeded


@dataclass(frozen=True, slots=True)
class Level:
    """The most that a request may get. A request always gets the least that it asks for."""

    vision_tokens: int
    visual_tokens: int
    closer_view: bool  # whether the 448-pixel view may be encoded
    frames: int  # of a clip

    def cap(self, budget: Budget) -> Budget:
        return Budget(
            vision_tokens=_capped(budget.vision_tokens, self.vision_tokens),
            visual_tokens=_capped(budget.visual_tokens, self.visual_tokens),
        )


def _capped(budget: tuple[int, int], most: int) -> tuple[int, int]:
    return budget[0], max(budget[0], min(budget[1], most))


LEVELS = (
    Level(400, 128, closer_view=True, frames=32),
    Level(192, 96, closer_view=True, frames=16),
    Level(128, 64, closer_view=False, frames=8),
    Level(96, 32, closer_view=False, frames=4),
    Level(64, 32, closer_view=False, frames=4),
)


class Fidelity:
    """Hold the level in force, an index of LEVELS. Times are seconds of any clock that does not go back.

    A target of infinity keeps level 0.
    """

    def __init__(self, target_s: float, now: float) -> None:
        self.level = 0
        self._target_s = target_s
        self._now = now
        self._since: float | None = None  # arrival of the request that waits longest; None: no request waits
        self._calm_since: float | None = now
        self._excess = 0.0  # seconds over the target, weighted by how many targets the wait is over it
        self._mark = (now, 0.0)  # a moment, and the longest wait at that moment
        self._changed_at, self._lowered = now, False
        self._told_at = now - STEP_S
        self._hold_s = [LEAST_HOLD_S] * len(LEVELS)  # seconds of calm before that level is tried

    def observe(self, now: float, waiting_since: float | None) -> int:
        """Return the level from now on.

        `waiting_since`: arrival of the request that waits longest; None if none waits.
        """
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
        """Account for the time until `now`, during which the same request waited longest."""
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
        is_shrinking = (marked_s - wait_s) * SOON_S > (wait_s - self._target_s) * (now - marked_at)
        if is_shrinking or self.level == len(LEVELS) - 1:
            return
        if self._lowered:
            self._judge(failed=now - self._changed_at < TRIAL_S)
        self._change(self.level + 1, now)

    def _judge(self, failed: bool) -> None:
        """Set the hold times after a trial.

        If this level cannot bear the load, no lower level can. If it can, all higher levels can.
        """
        if failed:
            longer_s = min(4 * self._hold_s[self.level], MOST_HOLD_S)
            self._hold_s[: self.level + 1] = [longer_s] * (self.level + 1)
        else:
            self._hold_s[self.level :] = [LEAST_HOLD_S] * (len(LEVELS) - self.level)

    def _change(self, level: int, at: float) -> None:
        self._lowered = level < self.level
        self.level, self._changed_at = level, at
