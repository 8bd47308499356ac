"""Wait for capacity, and take a step for several looks at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from service.admission.admission import Reservation
from service.admission.quota import NOTHING, Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.record.ticket import Ticket
from service.system.tasks import first_failure
from service.vision_stage.plan import Look

Result = TypeVar("Result")


async def turn(resource: Resource, amount: int, kind: Kind, ticket: Ticket) -> Claim:
    """Wait for capacity; the request's reservation holds it from now on. Raises Overloaded."""
    ticket.kind = kind
    request = ticket.request
    claim = Claim(resource, amount, kind, time.monotonic(), ticket.deadline, request.tenant, request.priority)
    with ticket.stage("queue"):
        await ticket.reservation.enter(claim)
    return claim


async def to_its_end(
    work: asyncio.Future[Result], claim: Claim, reservation: Reservation, cost: Cost = NOTHING, *, finished: bool = True
) -> Result:
    """Wait for work that the request has begun. If the request leaves, the work goes on, with the claim and the cost.

    It ends with the service. `finished` is false if the claim is for more than this work.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if reservation.service_is_ending:
            work.cancel()
        elif not work.done():
            work.add_done_callback(partial(_given_back, reservation.hand_over(claim, cost, finished=finished)))
        raise


def _given_back(give_back: Callable[[], None], work: asyncio.Future[Any]) -> None:
    """End work that its request has left. What went wrong concerns nobody any more."""
    if not work.cancelled():
        work.exception()
    give_back()


async def together(
    step: Callable[[Look, Ticket], Coroutine[Any, Any, None]], looks: Sequence[Look], ticket: Ticket
) -> None:
    """Do a step for all looks at the same time. The first failure cancels the other looks, and is raised."""
    if len(looks) <= 1:  # without tasks, which cost 0.1 ms
        for look in looks:
            await step(look, ticket)
        return
    async with first_failure() as tasks:
        for look in looks:
            tasks.create_task(step(look, ticket))
