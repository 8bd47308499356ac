"""What all requests together hold of the house, reserved before any of it is spent. Pure: `now` is an argument.

Cost, not heads, is counted: one large photo in a queue of ten can take more memory than a thousand questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.admission.drain_rate import Drain

TENANT_SHARE = 3  # a tenant may hold so many times what is left free: alone 3/4 of the house, of three each 3/10


class Cost(NamedTuple):
    """What a request takes, as far as its headers and metadata tell."""

    nbytes: int = 0  # of its body
    pixels: int = 0  # of an image that must be decoded
    tokens: int = 0  # of the LLM: visual, prompt and all it may write

    def plus(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.pixels + other.pixels, self.tokens + other.tokens)

    def minus(self, other: Cost) -> Cost:
        return Cost(self.nbytes - other.nbytes, self.pixels - other.pixels, self.tokens - other.tokens)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no room, and how long until there may be."""

    code: Literal["saturated", "tenant_share", "deadline", "shutting_down"]
    message: str
    retry_after_s: float


class Quota:
    """Reservations against limits. The sum of what is held never passes a limit.

    A tenant that gives its name holds at most TENANT_SHARE times what is free, so that there is always room for the
    next one; requests without a name have the whole house.
    """

    def __init__(self, limits: Cost) -> None:
        self.limits = limits
        self.held = Cost()
        self.closed = False  # refuses who holds nothing yet, from now on
        self._tenants: dict[str, Cost] = {}
        self._drains = [Drain() for _ in limits]

    @property
    def tenants(self) -> int:
        """Those that hold something now."""
        return len(self._tenants)

    def holds(self, unit: str) -> int:
        """`unit` is a field of Cost."""
        return int(getattr(self.held, unit))

    def refusal(self, cost: Cost, tenant: str, *, inside: bool = False) -> Refusal | None:
        """Why this cost has no room now, or None where it has. Who is `inside` may end what it began."""
        if self.closed and not inside:
            return Refusal("shutting_down", "this server is stopping: ask again, another one answers", 1.0)
        holds = self._tenants.get(tenant, Cost())
        for name, drain, ask, held, own, limit in zip(
            Cost._fields, self._drains, cost, self.held, holds, self.limits, strict=True
        ):
            if not ask:
                continue
            if held + ask > limit:
                wait_s = drain.seconds_for(held + ask - limit)
                return Refusal("saturated", f"the service is full ({held:,} of {limit:,} {name}): ask again", wait_s)
            if tenant and own + ask > TENANT_SHARE * (limit - held):
                wait_s = drain.seconds_for(own + ask - TENANT_SHARE * (limit - held))
                text = f"{tenant} has its share of the service ({own:,} of {limit:,} {name}): ask again"
                return Refusal("tenant_share", text, wait_s)
        return None

    def reserve(self, cost: Cost, tenant: str, now: float, *, inside: bool = False) -> Refusal | None:
        """Takes all of the cost, or nothing and says why."""
        refusal = self.refusal(cost, tenant, inside=inside)
        if refusal is None and any(cost):
            self._tenants[tenant] = self._tenants.get(tenant, Cost()).plus(cost)
            self.held = self.held.plus(cost)
            self._observe(Cost(), now)
        return refusal

    def give_back(self, cost: Cost, tenant: str, now: float) -> None:
        """What was reserved, whole or in parts."""
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
        """A dimension that is more than half full is wanted."""
        for drain, units, held, limit in zip(self._drains, given_back, self.held, self.limits, strict=True):
            drain.observe(now, units, pressed=2 * held > limit)
