"""Limit the memory that all requests hold together, and reserve it before it is used. Pure: `now` is an argument.

The quota counts cost, not requests: one large photo can take more memory than a thousand questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.admission.drain_rate import DrainRate

# A tenant may hold at most this many times what is left free. So one tenant gets 3/4 of all, and each of three 3/10.
TENANT_SHARE = 3
RETRY = "try again in a few seconds"
UNITS = {"nbytes": "request bytes", "pixels": "pixels to decode", "tokens": "LLM tokens"}


class Cost(NamedTuple):
    """Say what a request takes, according to its headers and metadata."""

    nbytes: int = 0  # of its body
    pixels: int = 0  # of images and clips that must be decoded
    tokens: int = 0  # of the LLM: visual, prompt and max_tokens

    def plus(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.pixels + other.pixels, self.tokens + other.tokens)

    def minus(self, other: Cost) -> Cost:
        return Cost(self.nbytes - other.nbytes, self.pixels - other.pixels, self.tokens - other.tokens)


NOTHING = Cost()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Say why there is no room, and estimate the time until there is."""

    code: Literal["saturated", "tenant_share", "deadline", "shutting_down"]
    message: str
    retry_after_s: float


class Quota:
    """Hold reservations against limits. Their sum never exceeds a limit.

    A tenant that gives its name holds at most TENANT_SHARE times what is free, so that there is always room for the
    next tenant. Requests without a tenant may hold everything.
    """

    def __init__(self, limits: Cost) -> None:
        self.limits = limits
        self.held = Cost()
        self.closed = False  # from now on refuse requests that hold nothing yet
        self._tenants: dict[str, Cost] = {}
        self._drains = [DrainRate() for _ in limits]

    def holds(self, unit: str) -> int:
        """Return the reserved amount of one unit, a field of Cost."""
        return int(getattr(self.held, unit))

    def refusal(self, cost: Cost, tenant: str, *, inside: bool = False, keep_free: Cost = NOTHING) -> Refusal | None:
        """Return why this cost has no room now, or None if it has.

        A request that was admitted before (`inside`) may finish after a stop. `keep_free` must be left of the limits.
        """
        if self.closed and not inside:
            return Refusal("shutting_down", "this server is stopping: try again, another server answers", 1.0)
        holds = self._tenants.get(tenant, Cost())
        for name, drain, ask, held, own, limit, kept in zip(
            Cost._fields, self._drains, cost, self.held, holds, self.limits, keep_free, strict=True
        ):
            if not ask:
                continue
            most = limit - kept
            if held + ask > most:
                wait_s = drain.seconds_for(held + ask - most)
                full = f"the server is at its limit of {UNITS[name]} ({held:,} of {most:,} are in use)"
                return Refusal("saturated", f"{full}: {RETRY}", wait_s)
            if tenant and own + ask > TENANT_SHARE * (limit - held):
                wait_s = drain.seconds_for(own + ask - TENANT_SHARE * (limit - held))
                full = f"tenant {tenant} is at its share of {UNITS[name]} ({own:,} of {limit:,} are in use)"
                return Refusal("tenant_share", f"{full}: {RETRY}", wait_s)
        return None

    def reserve(
        self, cost: Cost, tenant: str, now: float, *, inside: bool = False, keep_free: Cost = NOTHING
    ) -> Refusal | None:
        """Reserve the whole cost -> None; or reserve nothing and return the refusal."""
        refusal = self.refusal(cost, tenant, inside=inside, keep_free=keep_free)
        if refusal is None and any(cost):
            self._tenants[tenant] = self._tenants.get(tenant, Cost()).plus(cost)
            self.held = self.held.plus(cost)
            self._observe(Cost(), now)
        return refusal

    def give_back(self, cost: Cost, tenant: str, now: float) -> None:
        """Give back a reservation, whole or in parts."""
        if not any(cost):
            return
        self.held = self.held.minus(cost)
        holds = self._tenants[tenant].minus(cost)
        if any(holds):
            self._tenants[tenant] = holds
        else:
            del self._tenants[tenant]
        self._observe(cost, now)

    def _observe(self, given_back: Cost, now: float) -> None:
        """Update the drain rates. A unit counts as wanted if more than half of it is held."""
        for drain, units, held, limit in zip(self._drains, given_back, self.held, self.limits, strict=True):
            drain.observe(now, units, wanted=2 * held > limit)
