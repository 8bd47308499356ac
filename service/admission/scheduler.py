"""Who may enter now: requests wait here for a vision slot or for room in the LLM. Pure: no asyncio, `now` an argument.

A request claims one resource at a time: vision slots while its images are decoded and encoded, then tokens of the LLM
until it ends. It holds neither while it waits for the other, so that a follow-up never waits behind an encode and
nothing can lock. Each resource is given

  - to the tenant that holds the least of it,
  - there to the smallest rank: a claim's arrival, put back by its handicap, which is its kind's HANDICAP_S and for low
    priority LOW_PRIORITY_S more. The cheaper kind goes first, and age makes up for it: nobody who comes so much later
    overtakes,
  - past claims that do not fit, until these have waited for their handicap and PATIENCE_S: then nothing behind them
    starts.

So nothing that fits waits, but behind somebody out of patience. And nobody starves: with S the longest time that a
claim is held, P its handicap and PATIENCE_S together, and n the claims that arrived before this one was P old and start
before it, it waits at most P + PATIENCE_S + 2 S (n + 1): then one of them starts every 2 S, S until their tenants hold
nothing, S until nobody does.

A claim is dropped, and nothing spent on it, once what it needs at the least would end past its deadline. And a
request's first claim waits for the window too (`window.py`), so that no more are begun than can end in time.

`Fifo` is what all of this is compared with: one queue in order of arrival.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from service.admission.concurrency_limit import Window
from service.admission.drain_rate import Drain
from service.admission.quota import Refusal
from service.core.request import Priority

PATIENCE_S = 2.0
FORGIVENESS = 0.02  # how far one slower claim lifts the least time that claims are held


class Resource(StrEnum):
    VISION = "vision"  # images in decode and encode
    LLM = "llm"  # visual, prompt and answer tokens of running requests


class Kind(StrEnum):
    """Requests by what they cost."""

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
    """One request's wish for some of one resource. It is waiting, then started, then over."""

    resource: Resource
    amount: int  # images, or tokens
    kind: Kind
    arrived: float  # of the claim: a wait for one resource buys no place in the next queue
    deadline: float
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    request: object | None = None  # whose it is, where the window is to know
    request_arrived: float = 0.0  # decides in a Fifo
    handicap_s: float = 0.0  # once it was submitted
    started_at: float | None = None
    over: bool = False


Standing = tuple[float, int, Claim]  # rank, number, claim: numbers differ, so claims are never compared


@dataclass(slots=True)
class _Pool:
    """One resource and who waits for it."""

    limit: int
    free: int = field(init=False)
    held: dict[str, int] = field(default_factory=dict)  # by tenant; no zeros
    queues: dict[str, list[Standing]] = field(default_factory=dict)  # by tenant, in order; none is empty
    standing: dict[Claim, Standing] = field(default_factory=dict)
    waiting: dict[float, int] = field(default_factory=dict)  # amounts, by handicap
    running: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))  # claims
    deadlines: list[tuple[float, int, Claim]] = field(default_factory=list)  # heap; claims that left stay a while
    least_amount: float = math.inf  # nothing that waits is smaller
    least_s: float = 0.0  # about the shortest time that a claim was held of late
    drain: Drain = field(default_factory=Drain)

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
            self.deadlines.clear()

    def start(self, claim: Claim, now: float) -> None:
        claim.started_at = now
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
        """Those that wait and can no longer end in time leave."""
        late = []
        while self.deadlines and self.deadlines[0][0] - needed_s <= now:
            claim = heapq.heappop(self.deadlines)[2]
            if claim in self.standing:
                self.leave(claim)
                claim.over = True
                late.append(claim)
        return late

    def outstay(self, now: float, window: Window) -> list[Claim]:
        """Those that have waited for a first turn longer than a narrow window lets them leave."""
        late = [
            claim
            for claim in self.standing
            if not window.holds(claim.request) and window.latest_start(claim.arrived, claim.deadline) <= now
        ]
        for claim in late:
            self.leave(claim)
            claim.over = True
        return late

    def next(self, now: float, window: Window) -> Claim | None:
        """Whose turn it is, or None where nobody fits or who is out of patience does not."""
        if self.least_amount > self.free:
            return None
        least = math.inf
        for queue in self._in_turn():
            for rank, _, claim in queue:
                if not window.lets_in(claim.request):
                    least = min(least, claim.amount)
                    continue
                if claim.amount <= self.free:
                    return claim
                if now - rank >= PATIENCE_S:
                    return None
                least = min(least, claim.amount)
        self.least_amount = least
        return None

    def _in_turn(self) -> Iterable[list[Standing]]:
        """The tenant's first that holds the least; of equal ones, that whose first claim has the smallest rank."""
        if len(self.queues) == 1:
            return self.queues.values()
        return [self.queues[name] for name in sorted(self.queues, key=self._place)]

    def _place(self, tenant: str) -> tuple[int, float, int]:
        rank, number, _ = self.queues[tenant][0]
        return self.held.get(tenant, 0), rank, number

    def wait_s(self, claim: Claim) -> float:
        """About how long until it is this claim's turn; rather too little than too much."""
        if not self.standing:
            return 0.0
        ahead = sum(amount for handicap_s, amount in self.waiting.items() if handicap_s <= claim.handicap_s)
        tenants = len(self.queues.keys() | {claim.tenant})
        if tenants > 1:
            own = sum(each.amount for _, _, each in self.queues.get(claim.tenant, ()))
            ahead = min(ahead, own * tenants)
        return self.drain.seconds_for(ahead)


class Scheduler:
    """Two resources and those who wait for them."""

    def __init__(
        self,
        vision_slots: int,
        llm_tokens: int,
        handicap_s: Mapping[Kind, float] = HANDICAP_S,
        window: Window | None = None,
    ) -> None:
        self.window = Window() if window is None else window
        self._pools = {Resource.VISION: _Pool(vision_slots), Resource.LLM: _Pool(llm_tokens)}
        self._handicap_s = handicap_s
        self._count = 0

    def used(self, resource: Resource) -> int:
        return self._pools[resource].limit - self._pools[resource].free

    def waiting(self, kind: Kind) -> int:
        """How many claims of that kind wait."""
        return sum(claim.kind is kind for pool in self._pools.values() for claim in pool.standing)

    def waiting_since(self, now: float) -> float | None:
        """When the one came that waits longest, or would, were it not turned away for that; None: nobody waits, but
        for who may wait."""
        waiting = (claim for pool in self._pools.values() for claim in pool.standing)
        arrived = [claim.arrived for claim in waiting if claim.priority is Priority.NORMAL]
        if (kept_out_since := self.window.kept_out_since(now)) is not None:
            arrived.append(kept_out_since)
        return min(arrived, default=None)

    def running(self, kind: Kind) -> int:
        """How many claims of that kind hold what they claimed."""
        return sum(pool.running[kind] for pool in self._pools.values())

    def submit(self, claim: Claim, now: float) -> Refusal | None:
        """The claim waits until `schedule` starts it; or it is refused where it would wait past its deadline."""
        pool = self._pools[claim.resource]
        if claim.amount > pool.limit:
            raise ValueError(f"{claim.amount} of {claim.resource} is more than all there is, {pool.limit}")
        claim.handicap_s = self._handicap(claim)
        inside = self.window.holds(claim.request)
        if pool.standing and not (inside and self.window.is_narrow):  # then those ahead do not start before it
            wait_s = pool.wait_s(claim)
            latest = claim.deadline - self._needed_s(claim.resource)
            if not inside:
                latest = min(latest, self.window.latest_start(now, claim.deadline))
            if wait_s and now + wait_s > latest:
                self._turn_away([claim], now)
                text = (
                    f"it would wait about {wait_s:.1f} s for its turn and then not be answered in time: "
                    "raise timeout_s, or ask again later"
                )
                return Refusal("deadline", text, wait_s)
        self._count += 1
        pool.join(claim, self._rank(claim), self._count)
        pool.drain.observe(now, 0.0, pressed=True)
        return None

    def schedule(self, now: float) -> tuple[list[Claim], list[Claim]]:
        """Those whose turn it is now, and those dropped, as they can no longer end in time."""
        wanted = [resource for resource, pool in self._pools.items() if pool.standing]
        started, expired = [], [claim for resource in wanted for claim in self._drop(resource, now)]
        for turn in self._turns(now):
            pool = self._pools[turn.resource]
            pool.leave(turn)
            pool.start(turn, now)
            self.window.enter(turn.request, now)
            started.append(turn)
        for resource in wanted:
            if not (pool := self._pools[resource]).standing:
                pool.drain.observe(now, 0.0, pressed=False)
        return started, expired

    def too_late(self, claim: Claim) -> Refusal:
        """What to tell the owner of a claim that `schedule` dropped."""
        text = "its turn did not come in time for an answer: raise timeout_s, or ask again later"
        return Refusal("deadline", text, self._pools[claim.resource].wait_s(claim))

    def release(self, claim: Claim, now: float, *, finished: bool = True) -> None:
        """The claim waits no more and holds nothing; a second release does nothing.

        `finished` is false where its work was not done to the end, which tells nothing of how long work takes.
        """
        if claim.over:
            return
        claim.over = True
        pool = self._pools[claim.resource]
        if claim.started_at is None:
            if claim in pool.standing:  # else it never was submitted, or was refused
                pool.leave(claim)
                pool.drain.observe(now, 0.0, pressed=bool(pool.standing))
            return
        pool.give_back(claim)
        pool.drain.observe(now, claim.amount, pressed=bool(pool.standing))
        if finished:
            held_s = now - claim.started_at
            slower_s = pool.least_s + FORGIVENESS * (held_s - pool.least_s)
            pool.least_s = min(held_s, slower_s) if pool.least_s else held_s

    def _handicap(self, claim: Claim) -> float:
        return self._handicap_s[claim.kind] + (LOW_PRIORITY_S if claim.priority is Priority.LOW else 0.0)

    def _rank(self, claim: Claim) -> float:
        return claim.arrived + claim.handicap_s

    def _turns(self, now: float) -> Iterator[Claim]:
        """Whose turn it is, one after the other: each has started when the next is asked for."""
        for pool in self._pools.values():
            while (turn := pool.next(now, self.window)) is not None:
                yield turn

    def _drop(self, resource: Resource, now: float) -> list[Claim]:
        """Those that wait for it in vain leave."""
        pool, needed_s = self._pools[resource], self._needed_s(resource)
        expired = pool.expire(now, needed_s)
        if self.window.is_narrow:
            late = pool.outstay(now, self.window)
            self._turn_away(late, now)
            expired += late
        return expired

    def _turn_away(self, claims: Iterable[Claim], now: float) -> None:
        for claim in claims:
            if claim.priority is Priority.NORMAL:
                self.window.turn_away(claim.arrived, now)

    def _needed_s(self, resource: Resource) -> float:
        """From its turn to its end, at the least: after the vision stage comes the LLM."""
        needed_s = self._pools[Resource.LLM].least_s
        return needed_s + self._pools[Resource.VISION].least_s if resource is Resource.VISION else needed_s


class Fifo(Scheduler):
    """One queue in order of the requests' arrival, for comparison: whoever is at its head and does not fit blocks all
    behind it. A request inside that claims more blocks only those who want the same.

    Nothing else counts but deadlines and the window: no kind, no tenant, no priority, no age.
    """

    def _handicap(self, _: Claim) -> float:
        return 0.0

    def _rank(self, claim: Claim) -> float:
        return claim.request_arrived

    def _turns(self, _: float) -> Iterator[Claim]:
        while (turn := self._first()) is not None:
            yield turn

    def _first(self) -> Claim | None:
        blocked: set[Resource] = set()
        for _, _, claim in heapq.merge(*(queue for pool in self._pools.values() for queue in pool.queues.values())):
            fits = claim.amount <= self._pools[claim.resource].free and claim.resource not in blocked
            if fits and self.window.lets_in(claim.request):
                return claim
            if not self.window.holds(claim.request):
                return None
            blocked.add(claim.resource)
        return None
