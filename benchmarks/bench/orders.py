"""Serve with another scheduler for comparison: `python -m benchmarks.bench.orders fifo|unlimited`."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Mapping

from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.scheduler import HANDICAP_S, Claim, Kind, Resource, Scheduler


class Fifo(Scheduler):
    """Grant in order of arrival.

    The request at the head of the queue blocks all others if it does not fit. A request in service that claims more
    blocks only requests for the same resource. Only deadlines and the concurrency limit count besides: no kind, no
    tenant, no priority, no age.
    """

    def _handicap(self, _: Claim) -> float:
        return 0.0

    def _rank(self, claim: Claim) -> float:
        return claim.request_arrived

    def _grants(self, _: float) -> Iterator[Claim]:
        while (claim := self._first()) is not None:
            yield claim

    def _first(self) -> Claim | None:
        blocked: set[Resource] = set()
        for _, _, claim in heapq.merge(*(queue for pool in self._pools.values() for queue in pool.queues.values())):
            fits = claim.amount <= self._pools[claim.resource].free and claim.resource not in blocked
            if fits and self.limit.allows(claim.request):
                return claim
            if claim.request not in self.limit.contention:
                return None
            blocked.add(claim.resource)
        return None


class Unlimited(Scheduler):
    """Schedule without a concurrency limit: capacity alone bounds the requests in service."""

    def __init__(
        self,
        vision_slots: int,
        llm_tokens: int,
        handicap_s: Mapping[Kind, float] = HANDICAP_S,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        super().__init__(vision_slots, llm_tokens, handicap_s, ConcurrencyLimit(contention=limit and limit.contention))


ORDERS = {"fifo": Fifo, "unlimited": Unlimited}

if __name__ == "__main__":
    from service.__main__ import main

    sys.exit(main(scheduling=ORDERS[sys.argv[1]]))
