"""The asyncio side of admission: requests wait here for what the pure modules decide.

A `Reservation` is all that one request holds. When it ends, for whatever reason, everything is given back at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog

from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.contention import Contention
from service.admission.fidelity import LEVELS, Fidelity, Level
from service.admission.quota import NOTHING, Cost, Quota, Refusal
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.core.card import Engines
from service.core.errors import DeadlineExceeded, Overloaded
from service.metrics import Metrics
from service.settings import Settings

log = structlog.get_logger()

MAX_RETRY_AFTER_S = 60.0
# Questions by an image's id are smaller than this. Uploads leave them a quarter of the request bytes.
SMALL_BODY_BYTES = 64 * 1024
ENCODER_FILLS = 3  # vision slots for each image in encode: one is decoded and one attended to meanwhile


class Admission:
    """What all requests hold and wait for. Used from one event loop."""

    def __init__(
        self,
        settings: Settings,
        engines: Engines,
        max_positions: int,
        metrics: Metrics,
        scheduling: type[Scheduler] = Scheduler,
    ) -> None:
        """`max_positions`: tokens of the longest request. `scheduling`: benchmarks pass another order to compare."""
        self.vision_slots = vision_slots = settings.vision_slots or ENCODER_FILLS * engines.encoder_images
        llm_tokens = settings.llm_tokens or engines.llm_rows * max_positions
        self.row_tokens = llm_tokens // engines.llm_rows  # a request takes a whole row, however short it is
        tokens = max(settings.max_requests_in_flight * self.row_tokens, max_positions)
        self.quota = quota = Quota(Cost(settings.max_bytes_in_flight, settings.max_pixels_in_flight, tokens))
        self.kept_for_small_bodies = Cost(nbytes=settings.max_bytes_in_flight - settings.max_upload_bytes_in_flight)
        now = time.monotonic()
        self.contention = Contention(settings.fidelity_target_s, now)
        self.limit = limit = ConcurrencyLimit(vision_slots + engines.llm_rows, self.contention)
        self.scheduler = scheduler = scheduling(vision_slots, llm_tokens, limit=limit)
        self.controller = Fidelity(settings.fidelity_target_s if settings.elastic_fidelity else math.inf, now)
        self._strain = "calm"  # which wait was the longest last time: "waiting" in a queue, or "late" by contention
        self._metrics = metrics
        self._grants: dict[Claim, asyncio.Future[None]] = {}  # of the claims that wait
        for kind in Kind:
            metrics.requests_waiting.labels(kind).set_function(partial(scheduler.waiting, kind))
            metrics.requests_running.labels(kind).set_function(partial(scheduler.running, kind))
        for resource in Resource:
            metrics.resource_used.labels(resource).set_function(partial(scheduler.used, resource))
        for unit in Cost._fields:
            metrics.admitted_cost.labels(unit).set_function(partial(quota.holds, unit))
        metrics.concurrency_limit.set_function(lambda: limit.width)
        metrics.fidelity_level.set_function(lambda: LEVELS.index(self.fidelity))

    @property
    def fidelity(self) -> Level:
        """How closely a request may look now."""
        return LEVELS[self._observe(time.monotonic())]

    @contextmanager
    def reservation(self, tenant: str) -> Iterator[Reservation]:
        """Holds nothing yet."""
        reservation = Reservation(self, tenant)
        with reservation.work():
            yield reservation

    def stop(self) -> None:
        """Requests that hold something may finish; refuse all others from now on."""
        self.quota.closed = True

    def refuse(self, refusal: Refusal) -> Overloaded:
        self._metrics.refusals.labels(refusal.code).inc()
        retry_after_s = min(max(refusal.retry_after_s, 1.0), MAX_RETRY_AFTER_S)
        return Overloaded(refusal.message, retry_after_s=retry_after_s, code=refusal.code)

    async def grant(self, claim: Claim) -> None:
        """Return when the claim is granted. Raises Overloaded if that would be too late, DeadlineExceeded if it is."""
        now = time.monotonic()
        if (refusal := self.scheduler.submit(claim, now)) is not None:
            raise self.refuse(refusal)
        self.schedule(now)
        if claim.granted_at is None and not claim.over:
            grant = self._grants[claim] = asyncio.get_running_loop().create_future()
            await grant
        if claim.granted_at is None:
            if time.monotonic() >= claim.deadline:
                raise DeadlineExceeded(
                    "The request waited in the queue for all of timeout_s. Raise it, or retry when the service is "
                    "less busy.",
                    param="timeout_s",
                )
            raise self.refuse(self.scheduler.expired(claim))

    def release(self, claims: Sequence[Claim], now: float, *, finished: bool) -> None:
        """Wakes nobody: `schedule` does, once everything is given back that goes together."""
        for claim in claims:
            self._grants.pop(claim, None)
            self.scheduler.release(claim, now, finished=finished)

    def schedule(self, now: float) -> None:
        """Wake the requests whose claims are granted, and those whose claims expired."""
        granted, expired = self.scheduler.schedule(now)
        for claim in (*granted, *expired):
            grant = self._grants.pop(claim, None)
            if grant is not None and not grant.done():
                grant.set_result(None)
        self._observe(now)

    def _observe(self, now: float) -> int:
        """The level of fidelity from now on."""
        before = self.controller.level
        since = {"waiting": self.scheduler.waiting_since(now), "late": self.contention.waiting_since(now)}
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
    """All that one request holds: its cost of the quota, and its claims on the scheduler's resources."""

    def __init__(self, admission: Admission, tenant: str) -> None:
        self.tenant = tenant
        self._admission = admission
        self._arrived = time.monotonic()
        self._cost = Cost()
        self._inside = False  # let in before a stop, it may finish after it
        self._claims: list[Claim] = []
        self._waits = 0  # for what other requests compute
        self._deadline = math.inf

    def require_room(self, cost: Cost, *, keep_free: Cost = NOTHING) -> None:
        """Reserves nothing. Raises Overloaded if the cost could not be reserved now."""
        quota = self._admission.quota
        if (refusal := quota.refusal(cost, self.tenant, inside=self._inside, keep_free=keep_free)) is not None:
            raise self._admission.refuse(refusal)
        self._inside = True

    def reserve(self, cost: Cost, *, keep_free: Cost = NOTHING) -> None:
        """Hold this too until the `work` around it ends. Raises Overloaded."""
        now, quota = time.monotonic(), self._admission.quota
        refusal = quota.reserve(cost, self.tenant, now, inside=self._inside, keep_free=keep_free)
        if refusal is not None:
            raise self._admission.refuse(refusal)
        self._cost = self._cost.plus(cost)
        self._inside = True

    def require_bytes(self, nbytes: int) -> None:
        """`require_room` for a body of this size."""
        self.require_room(Cost(nbytes=nbytes), keep_free=self._kept_free(nbytes))

    def reserve_bytes(self, nbytes: int) -> None:
        """`reserve` more bytes of a request's body."""
        self.reserve(Cost(nbytes=nbytes), keep_free=self._kept_free(self._cost.nbytes + nbytes))

    def _kept_free(self, nbytes: int) -> Cost:
        """What a body of this size must leave to small ones."""
        return NOTHING if nbytes <= SMALL_BODY_BYTES else self._admission.kept_for_small_bodies

    @contextmanager
    def work(self) -> Iterator[None]:
        """At its end, give back what was reserved and claimed in the block. Keep what was reserved before."""
        before = self._cost
        try:
            yield
        except BaseException:
            self._end(answered=False, keep=before)
            raise
        self._end(answered=True, keep=before)

    async def enter(self, claim: Claim) -> None:
        """Wait for the grant, and hold it until it is given back or the `work` around it ends. Raises Overloaded,
        DeadlineExceeded."""
        claim.request, claim.request_arrived, self._deadline = self, self._arrived, claim.deadline
        self._claims.append(claim)
        self._pause_or_resume()
        try:
            await self._admission.grant(claim)
        except Overloaded:  # the request may go on without it
            self._claims.remove(claim)
            self._pause_or_resume()
            raise

    def give_back(self, claim: Claim, *, finished: bool = True) -> None:
        """Its work is done; `finished=False` if it is to be claimed again."""
        self._claims.remove(claim)
        self._pause_or_resume()
        now = time.monotonic()
        self._admission.release([claim], now, finished=finished)
        self._admission.schedule(now)

    @contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """The block waits for what another request computes."""
        self._waits += 1
        if self._pause_or_resume():
            self._admission.schedule(time.monotonic())
        try:
            yield
        finally:
            self._waits -= 1
            self._pause_or_resume()

    def _pause_or_resume(self) -> bool:
        """A request that claims nothing and waits for others does not count as working. Returns whether that makes
        room for another one."""
        contention = self._admission.contention
        if self._waits and not self._claims:
            return contention.pause(self)
        contention.resume(self)
        return False

    def _end(self, *, answered: bool, keep: Cost) -> None:
        """Give back all but `keep`. `answered` is false if the request did not come to its answer."""
        now, admission = time.monotonic(), self._admission
        admission.release(self._claims, now, finished=answered)
        admission.limit.end(self, now, answered=answered, missed=now >= self._deadline)
        admission.quota.give_back(self._cost.minus(keep), self.tenant, now)
        self._claims, self._cost = [], keep
        admission.schedule(now)
