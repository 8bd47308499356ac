"""Requests wait here for what the quota and the scheduler decide: the asyncio side of both.

A `Reservation` is what one request holds. Leaving it, however that comes about, gives everything back at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog

from service.admission.concurrency_limit import Window
from service.admission.fidelity import LEVELS, Crowd, Fidelity, Level
from service.admission.quota import Cost, Quota, Refusal
from service.admission.scheduler import Claim, Fifo, Kind, Resource, Scheduler
from service.core.card import Engines
from service.core.errors import DeadlineExceeded, Overloaded
from service.core.request import Priority
from service.metrics import Metrics
from service.settings import Settings

log = structlog.get_logger()

MAX_RETRY_AFTER_S = 60.0
ENCODER_FILLS = 3  # vision slots for each image in encode: one is decoded and one attended to meanwhile


class Admission:
    """The house: what it holds and who waits in it. Used from one event loop."""

    def __init__(self, settings: Settings, engines: Engines, max_positions: int, metrics: Metrics) -> None:
        """`max_positions` are the tokens of the longest request."""
        self.vision_slots = vision_slots = settings.vision_slots or ENCODER_FILLS * engines.encoder_images
        llm_tokens = settings.llm_tokens or engines.llm_rows * max_positions
        self.row_tokens = llm_tokens // engines.llm_rows  # a request takes a whole row, however short it is
        tokens = max(settings.max_requests_in_flight * self.row_tokens, max_positions)
        self.quota = quota = Quota(Cost(settings.max_bytes_in_flight, settings.max_pixels_in_flight, tokens))
        self.window = window = Window(vision_slots + engines.llm_rows)
        scheduling = Fifo if settings.scheduling == "fifo" else Scheduler
        self.scheduler = scheduler = scheduling(vision_slots, llm_tokens, window=window)
        now = time.monotonic()
        self.crowd = Crowd(settings.fidelity_target_s, now)
        self.controller = Fidelity(settings.fidelity_target_s if settings.elastic_fidelity else math.inf, now)
        self._strain = "calm"  # or "waiting" for a turn, or "late": which wait was the longest, last time
        self._metrics = metrics
        self._turns: dict[Claim, asyncio.Future[None]] = {}  # of those that wait
        for kind in Kind:
            metrics.requests_waiting.labels(kind).set_function(partial(scheduler.waiting, kind))
            metrics.requests_running.labels(kind).set_function(partial(scheduler.running, kind))
        for resource in Resource:
            metrics.resource_used.labels(resource).set_function(partial(scheduler.used, resource))
        for unit in Cost._fields:
            metrics.admitted_cost.labels(unit).set_function(partial(quota.holds, unit))
        metrics.request_window.set_function(lambda: window.width)
        metrics.fidelity_level.set_function(lambda: LEVELS.index(self.fidelity))

    @property
    def fidelity(self) -> Level:
        """How closely a request may look that looks now."""
        return LEVELS[self._observe(time.monotonic())]

    @contextmanager
    def reservation(self, tenant: str) -> Iterator[Reservation]:
        """Holds nothing yet."""
        reservation = Reservation(self, tenant)
        with reservation.work():
            yield reservation

    def stop(self) -> None:
        """Who is in may end; nobody else comes in."""
        self.quota.closed = True

    def refuse(self, refusal: Refusal) -> Overloaded:
        self._metrics.refusals.labels(refusal.code).inc()
        retry_after_s = min(max(refusal.retry_after_s, 1.0), MAX_RETRY_AFTER_S)
        return Overloaded(refusal.message, retry_after_s=retry_after_s, code=refusal.code)

    async def turn(self, claim: Claim) -> None:
        """Returns when it is the claim's turn. Raises Overloaded where that would be too late, DeadlineExceeded where
        it is."""
        now = time.monotonic()
        if (refusal := self.scheduler.submit(claim, now)) is not None:
            raise self.refuse(refusal)
        self.schedule(now)
        if claim.started_at is None and not claim.over:
            turn = self._turns[claim] = asyncio.get_running_loop().create_future()
            await turn
        if claim.started_at is None:
            if time.monotonic() >= claim.deadline:
                raise DeadlineExceeded(
                    "its turn did not come within timeout_s: raise it, or ask again when the service is less busy",
                    param="timeout_s",
                )
            raise self.refuse(self.scheduler.too_late(claim))

    def release(self, claims: Sequence[Claim], now: float, *, finished: bool) -> None:
        """Wakes nobody: `schedule` does, once all is given back that goes together."""
        for claim in claims:
            self._turns.pop(claim, None)
            self.scheduler.release(claim, now, finished=finished)

    def schedule(self, now: float) -> None:
        """Wakes those whose turn it is, and those for whom it comes too late."""
        started, expired = self.scheduler.schedule(now)
        for claim in (*started, *expired):
            turn = self._turns.pop(claim, None)
            if turn is not None and not turn.done():
                turn.set_result(None)
        self._observe(now)

    def _observe(self, now: float) -> int:
        """The level of fidelity."""
        before = self.controller.level
        since = {"waiting": self.scheduler.waiting_since(now), "late": self.crowd.waiting_since(now)}
        waits = {strain: began for strain, began in since.items() if began is not None}
        level = self.controller.observe(now, min(waits.values(), default=None))
        if level != before:
            self._metrics.fidelity_changes.inc()
            most = LEVELS[level]
            log.info(
                "fidelity",
                fidelity_level=level,
                reason=self._strain if level > before else "calm",
                vision_tokens=most.vision_tokens,
                visual_tokens=most.visual_tokens,
            )
        self._strain = min(waits, key=waits.__getitem__, default="calm")
        return level


class Reservation:
    """What one request has of the house."""

    def __init__(self, admission: Admission, tenant: str) -> None:
        self.tenant = tenant
        self._admission = admission
        self._arrived = time.monotonic()
        self._cost = Cost()
        self._inside = False  # let in before a stop, it may end
        self._claims: list[Claim] = []
        self._waits = 0  # for what others bring
        self._deadline = math.inf

    def require_room(self, cost: Cost) -> None:
        """Takes nothing. Raises Overloaded where the cost could not be reserved now."""
        if (refusal := self._admission.quota.refusal(cost, self.tenant)) is not None:
            raise self._admission.refuse(refusal)
        self._inside = True

    def reserve(self, cost: Cost) -> None:
        """Holds this too, until the work that it is reserved in ends. Raises Overloaded."""
        now = time.monotonic()
        if (refusal := self._admission.quota.reserve(cost, self.tenant, now, inside=self._inside)) is not None:
            raise self._admission.refuse(refusal)
        self._cost = self._cost.plus(cost)
        self._inside = True

    def reserve_bytes(self, nbytes: int) -> None:
        """As `reserve`, of a request's body."""
        self.reserve(Cost(nbytes=nbytes))

    @contextmanager
    def work(self) -> Iterator[None]:
        """Gives back at its end what was reserved and claimed in it, and keeps what was reserved before."""
        before = self._cost
        try:
            yield
        except BaseException:
            self.leave(finished=False, keep=before)
            raise
        self.leave(finished=True, keep=before)

    async def enter(self, claim: Claim) -> None:
        """Waits for the claim's turn and holds it until it is given back or the reservation ends. Raises Overloaded."""
        claim.request, claim.request_arrived, self._deadline = self, self._arrived, claim.deadline
        self._claims.append(claim)
        self._rest_or_work()
        try:
            await self._admission.turn(claim)
        except Overloaded:  # a request may go on without it
            self._claims.remove(claim)
            self._rest_or_work()
            raise
        allowed_s = math.inf if claim.priority is Priority.LOW else claim.deadline - claim.arrived
        self._admission.crowd.enter(self, time.monotonic(), allowed_s)

    def give_back(self, claim: Claim, *, finished: bool = True) -> None:
        """Its work is done, or not `finished` and to be claimed for again."""
        self._claims.remove(claim)
        self._rest_or_work()
        now = time.monotonic()
        self._admission.release([claim], now, finished=finished)
        self._admission.schedule(now)

    @contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """For as long as what another request brings is waited for."""
        self._waits += 1
        if self._rest_or_work():
            self._admission.schedule(time.monotonic())
        try:
            yield
        finally:
            self._waits -= 1
            self._rest_or_work()

    def _rest_or_work(self) -> bool:
        """Nobody works on a request that claims nothing and waits for others. Whether that makes room for them."""
        window = self._admission.window
        if self._waits and not self._claims:
            return window.rest(self)
        window.work(self)
        return False

    def leave(self, *, finished: bool, keep: Cost) -> None:
        """`finished` is false where the request did not come to its answer. It goes on holding what it keeps."""
        now, house = time.monotonic(), self._admission
        house.release(self._claims, now, finished=finished)
        house.window.leave(self, now, answered=finished, missed=now >= self._deadline)
        house.crowd.leave(self, now, answered=finished)
        house.quota.give_back(self._cost.minus(keep), self.tenant, now)
        self._claims, self._cost = [], keep
        house.schedule(now)
