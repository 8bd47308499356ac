"""Decide which waiting claim is granted next. Pure: no asyncio, `now` is an argument.

A request claims one resource at a time: vision slots while its images are decoded and encoded, then tokens of the LLM
until it ends. It holds neither while it waits for the other. So a follow-up never waits behind an encode, and there is
no deadlock. These rules choose the next claim:

  - The tenant that holds least of the resource goes first.
  - Inside a tenant, the smallest rank goes first. A claim's rank is its arrival plus its handicap. The handicap is its
    kind's HANDICAP_S and, for low priority, LOW_PRIORITY_S more. So the cheaper kind goes first, but an old claim keeps
    its place. A claim overtakes another only if it arrived less than the difference of their handicaps later.
  - A claim passes others that do not fit. But after one of those has waited its handicap and PATIENCE_S, it is out of
    patience, and nothing behind it starts.

So a claim that fits waits only behind one that is out of patience, and no claim starves. Its wait has a bound. Let S be
the longest time that a claim is held, and P the claim's handicap plus PATIENCE_S. Let n be the number of claims that
start before it and arrived before it was P old. It waits at most P + PATIENCE_S + 2 S (n + 1). The reason: after
P + PATIENCE_S, one of these claims starts every 2 S. After S their tenants hold nothing, after 2 S no tenant does.

A claim expires, before work is spent on it, if its shortest possible work would end after its deadline. A request's
first claim also waits for the concurrency limit (`concurrency_limit.py`), so that no more requests start than can end
in time.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.drain_rate import DrainRate
from service.admission.quota import Refusal
from service.core.request import Priority

PATIENCE_S = 2.0
FORGIVENESS = 0.02  # share of the difference by which a slower claim raises `least_s`


class Resource(StrEnum):
    VISION = "vision"  # images in decode and encode
    LLM = "llm"  # visual, prompt and answer tokens of running requests


class Kind(StrEnum):
    """Group requests by their cost."""

    FOLLOW_UP = "follow_up"  # the features are known
    SINGLE_IMAGE = "single_image"
    MULTI_IMAGE = "multi_image"

    @classmethod
    def of(cls, new_images: int) -> Kind:
        return (cls.FOLLOW_UP, cls.SINGLE_IMAGE, cls.MULTI_IMAGE)[min(new_images, 2)]


HANDICAP_S: Mapping[Kind, float] = {Kind.FOLLOW_UP: 0.0, Kind.SINGLE_IMAGE: 0.5, Kind.MULTI_IMAGE: 1.0}
LOW_PRIORITY_S = 10.0


@dataclass(slots=True, eq=False)
class Claim:
    """Claim an amount of one resource for a request: waiting, then granted, then over."""

    resource: Resource
    amount: int  # images, or tokens
    kind: Kind
    arrived: float  # of the claim, not of the request: a wait for one resource gives no rank in the next queue
    deadline: float
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    request: object | None = None  # its request, for the concurrency limit; None: the limit does not apply
    request_arrived: float = 0.0
    handicap_s: float = 0.0  # set by `submit`
    granted_at: float | None = None
    over: bool = False

    @property
    def allowed_s(self) -> float:
        """Return how much time the request may lose to others; infinity for low priority."""
        return math.inf if self.priority is Priority.LOW else self.deadline - self.arrived


Standing = tuple[float, int, Claim]  # rank, number, claim: numbers differ, so claims are never compared


@dataclass(slots=True)
class _Pool:
    """Hold one resource and the claims that wait for it."""

    limit: int
    free: int = field(init=False)
    held: dict[str, int] = field(default_factory=dict)  # by tenant; no zeros
    queues: dict[str, list[Standing]] = field(default_factory=dict)  # by tenant, in order; none is empty
    standing: dict[Claim, Standing] = field(default_factory=dict)
    waiting: dict[float, int] = field(default_factory=dict)  # amounts, by handicap
    running: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))  # claims
    deadlines: list[tuple[float, int, Claim]] = field(default_factory=list)  # heap; half may be claims that have left
    least_amount: float = math.inf  # no waiting claim is smaller
    least_s: float = 0.0  # about the shortest time for which a recent claim was held
    drain: DrainRate = field(default_factory=DrainRate)

    def __post_init__(self) -> None:
        self.free = self.limit

    def join(self, claim: Claim, rank: float, number: int) -> None:
        spot = self.standing[claim] = (rank, number, claim)
        insort(self.queues.setdefault(claim.tenant, []), spot)
        heapq.heappush(self.deadlines, (claim.deadline, number, claim))
        self.waiting[claim.handicap_s] = self.waiting.get(claim.handicap_s, 0) + claim.amount
        self.least_amount = min(self.least_amount, claim.amount)

    def leave(self, claim: Claim) -> None:
        queue, spot = self.queues[claim.tenant], self.standing.pop(claim)
        del queue[bisect_left(queue, spot)]
        if not queue:
            del self.queues[claim.tenant]
        self.waiting[claim.handicap_s] -= claim.amount
        if not self.standing:
            self.least_amount = math.inf
        if len(self.deadlines) > 2 * len(self.standing):
            self.deadlines = [each for each in self.deadlines if each[2] in self.standing]
            heapq.heapify(self.deadlines)

    def grant(self, claim: Claim, now: float) -> None:
        claim.granted_at = now
        self.free -= claim.amount
        self.running[claim.kind] += 1
        self.held[claim.tenant] = self.held.get(claim.tenant, 0) + claim.amount

    def give_back(self, claim: Claim) -> None:
        self.free += claim.amount
        self.running[claim.kind] -= 1
        self.held[claim.tenant] -= claim.amount
        if not self.held[claim.tenant]:
            del self.held[claim.tenant]

    def expire(self, now: float, needed_s: float) -> list[Claim]:
        """Remove the waiting claims that can no longer end in time."""
        late = []
        while self.deadlines and self.deadlines[0][0] - needed_s <= now:
            claim = heapq.heappop(self.deadlines)[2]
            if claim in self.standing:
                self.leave(claim)
                claim.over = True
                late.append(claim)
        return late

    def outstay(self, now: float, limit: ConcurrencyLimit) -> list[Claim]:
        """Remove first claims that have waited longer than a narrow limit allows."""
        late = [
            claim
            for claim in self.standing
            if claim.request not in limit.contention and limit.latest_start(claim.arrived, claim.deadline) <= now
        ]
        for claim in late:
            self.leave(claim)
            claim.over = True
        return late

    def next(self, now: float, limit: ConcurrencyLimit) -> Claim | None:
        """Return the claim to grant. None if no claim fits, or if one that is out of patience does not fit."""
        if self.least_amount > self.free:
            return None
        least = math.inf
        for queue in self._by_tenant():
            for rank, _, claim in queue:
                if not limit.allows(claim.request):
                    least = min(least, claim.amount)
                    continue
                if claim.amount <= self.free:
                    return claim
                if now - rank >= PATIENCE_S:
                    return None
                least = min(least, claim.amount)
        self.least_amount = least
        return None

    def _by_tenant(self) -> Iterable[list[Standing]]:
        """Order the queues: first the tenant that holds the least; among equals, the one with the smallest rank."""
        if len(self.queues) == 1:
            return self.queues.values()
        return [self.queues[name] for name in sorted(self.queues, key=self._tenant_order)]

    def _tenant_order(self, tenant: str) -> tuple[int, float, int]:
        rank, number, _ = self.queues[tenant][0]
        return self.held.get(tenant, 0), rank, number

    def wait_s(self, claim: Claim) -> float:
        """Estimate the queue time of this claim; the estimate is low rather than high."""
        if not self.standing:
            return 0.0
        ahead = sum(amount for handicap_s, amount in self.waiting.items() if handicap_s <= claim.handicap_s)
        tenants = len(self.queues) + (claim.tenant not in self.queues)
        if tenants > 1:
            own = sum(each.amount for _, _, each in self.queues.get(claim.tenant, ()))
            ahead = min(ahead, own * tenants)
        return self.drain.seconds_for(ahead)


class Scheduler:
    """Grant two resources, vision slots and LLM tokens, to claims."""

    def __init__(
        self,
        vision_slots: int,
        llm_tokens: int,
        handicap_s: Mapping[Kind, float] = HANDICAP_S,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.limit = ConcurrencyLimit() if limit is None else limit
        self._pools = {Resource.VISION: _Pool(vision_slots), Resource.LLM: _Pool(llm_tokens)}
        self._handicap_s = handicap_s
        self._count = 0

    def used(self, resource: Resource) -> int:
        return self._pools[resource].limit - self._pools[resource].free

    def waiting(self, kind: Kind) -> int:
        """Number of waiting claims of that kind."""
        return sum(claim.kind is kind for pool in self._pools.values() for claim in pool.standing)

    def waiting_since(self, now: float) -> float | None:
        """Return the arrival of the claim of normal priority that waits longest; None if there is none.

        Claims that were refused because of too long a wait count too.
        """
        waiting = (claim for pool in self._pools.values() for claim in pool.standing)
        arrived = [claim.arrived for claim in waiting if claim.priority is Priority.NORMAL]
        if (refusing_since := self.limit.refusing_since(now)) is not None:
            arrived.append(refusing_since)
        return min(arrived, default=None)

    def running(self, kind: Kind) -> int:
        """Number of granted claims of that kind."""
        return sum(pool.running[kind] for pool in self._pools.values())

    def submit(self, claim: Claim, now: float) -> Refusal | None:
        """Queue the claim until `schedule` grants it; refuse it if it would wait past its deadline."""
        pool = self._pools[claim.resource]
        if (refusal := self.refusal(claim, now)) is not None:
            self._count_refused([claim], now)
            return refusal
        self._count += 1
        pool.join(claim, self._rank(claim), self._count)
        pool.drain.observe(now, 0.0, wanted=True)
        return None

    def refusal(self, claim: Claim, now: float) -> Refusal | None:
        """Return why `submit` would refuse the claim now. It sets the claim's handicap and changes nothing else."""
        pool = self._pools[claim.resource]
        if claim.amount > pool.limit:
            raise ValueError(f"the claim on {claim.resource} is {claim.amount}, more than its limit of {pool.limit}")
        claim.handicap_s = self._handicap(claim)
        in_service = claim.request in self.limit.contention
        # A narrow limit holds back the claims ahead of a request in service, so it does not wait for them. And the LLM
        # comes last: a refusal would waste all the work that is done.
        if in_service and (self.limit.is_narrow or claim.resource is Resource.LLM):
            return None
        wait_s = pool.wait_s(claim)
        later_s = self._pools[Resource.LLM].wait_s(claim) if claim.resource is Resource.VISION else 0.0
        if not wait_s and not later_s:
            return None
        latest = claim.deadline - self._needed_s(claim.resource) - later_s
        if not in_service:
            latest = min(latest, self.limit.latest_start(now, claim.deadline))
        if now + wait_s <= latest:
            return None
        text = (
            f"the estimated queue time is {wait_s + later_s:.1f} s, which leaves too little of timeout_s for an "
            "answer: raise timeout_s, or try again when the service is less busy"
        )
        return Refusal("deadline", text, wait_s + later_s)

    def schedule(self, now: float) -> tuple[list[Claim], list[Claim]]:
        """Grant the claims that can start -> the granted claims, and the expired ones, which cannot end in time."""
        wanted = [resource for resource, pool in self._pools.items() if pool.standing]
        granted, expired = [], [claim for resource in wanted for claim in self._expire(resource, now)]
        for claim in self._grants(now):
            pool = self._pools[claim.resource]
            pool.leave(claim)
            pool.grant(claim, now)
            if claim.request is not None:
                self.limit.contention.start(claim.request, now, claim.allowed_s)
            granted.append(claim)
        for resource in wanted:
            if not (pool := self._pools[resource]).standing:
                pool.drain.observe(now, 0.0, wanted=False)
        return granted, expired

    def expired(self, claim: Claim) -> Refusal:
        """Return the refusal for a claim that `schedule` reported as expired."""
        text = (
            "the request waited in the queue until too little of timeout_s was left: raise timeout_s, or try again "
            "when the service is less busy"
        )
        return Refusal("deadline", text, self._pools[claim.resource].wait_s(claim))

    def release(self, claim: Claim, now: float, *, finished: bool = True) -> None:
        """End a claim: it stops waiting, or gives its amount back. A second release does nothing.

        Pass `finished=False` if its work was not done to the end. Its time then does not count for `least_s`.
        """
        if claim.over:
            return
        claim.over = True
        pool = self._pools[claim.resource]
        if claim.granted_at is None:
            if claim in pool.standing:  # else it never was submitted, or was refused
                pool.leave(claim)
                pool.drain.observe(now, 0.0, wanted=bool(pool.standing))
            return
        pool.give_back(claim)
        pool.drain.observe(now, claim.amount, wanted=bool(pool.standing))
        if finished:
            held_s = now - claim.granted_at
            slower_s = pool.least_s + FORGIVENESS * (held_s - pool.least_s)
            pool.least_s = min(held_s, slower_s) if pool.least_s else held_s

    def _handicap(self, claim: Claim) -> float:
        return self._handicap_s[claim.kind] + (LOW_PRIORITY_S if claim.priority is Priority.LOW else 0.0)

    def _rank(self, claim: Claim) -> float:
        return claim.arrived + claim.handicap_s

    def _grants(self, now: float) -> Iterator[Claim]:
        """Yield the claims to grant, one at a time. The caller must grant each one before it asks for the next."""
        for pool in self._pools.values():
            while (claim := pool.next(now, self.limit)) is not None:
                yield claim

    def _expire(self, resource: Resource, now: float) -> list[Claim]:
        """Remove and return the waiting claims that can no longer be granted in time."""
        pool, needed_s = self._pools[resource], self._needed_s(resource)
        expired = pool.expire(now, needed_s)
        if self.limit.is_narrow:
            late = pool.outstay(now, self.limit)
            self._count_refused(late, now)
            expired += late
        return expired

    def _count_refused(self, claims: Iterable[Claim], now: float) -> None:
        for claim in claims:
            if claim.priority is Priority.NORMAL:
                self.limit.refused(claim.arrived, now)

    def _needed_s(self, resource: Resource) -> float:
        """Estimate the shortest time from a grant to the request's end. After the vision stage comes the LLM."""
        needed_s = self._pools[Resource.LLM].least_s
        return needed_s + self._pools[Resource.VISION].least_s if resource is Resource.VISION else needed_s
