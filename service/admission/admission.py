"""Let requests wait for the decisions of the pure modules: the asyncio side of admission.

A `Reservation` is all that one request holds. When it ends, for whatever reason, it gives everything back at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from types import TracebackType

import structlog

from service.admission.batch_turns import BatchTurns
from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.contention import Contention
from service.admission.fidelity import LEVELS, Fidelity, Level
from service.admission.patience import NO_PATIENCE
from service.admission.quota import NOTHING, Cost, Quota, Refusal
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.core.access import UNLIMITED, Account
from service.core.card import Engines
from service.core.errors import BATCH_WAIT, SHORT_DEADLINE, DeadlineExceeded, Overloaded, ShuttingDown
from service.core.variant import Served
from service.settings import Settings
from service.telemetry.metrics import Metrics

log = structlog.get_logger()

MAX_RETRY_AFTER_S = 60.0
# Questions by an image's id are smaller than this. Uploads leave them a quarter of the request bytes.
SMALL_BODY_BYTES = 64 * 1024
MAX_LAG_S = 0.01  # of the event loop; above it new requests are refused before they cost more than this decision
UNHURRIED = 64  # so many open requests are let in however late the loop is: it may be another program's fault
OBSERVE_S = 0.02  # between two looks for the longest wait
REFUSAL_PAUSE_S = 0.01  # after a question was read and refused; in a crowd, new ones are refused unread meanwhile
# Reading a question and refusing it takes about a millisecond of the loop. After a burst of READ_REFUSALS, this is
# the least time between two such refusals. If there are more and the loop is late, requests of their size are refused
# unread, however few are open, for as long as a burst may take.
READ_REFUSALS = 32
READ_REFUSAL_S = 0.016
SMALL_QUESTION_BYTES = 4 * 1024  # of a body without images; most such questions name theirs by id
BATCH_SHARE = 4  # one tenant's batches take at most this part of the requests that the LLM decodes at once
ENCODER_FILLS = 3  # vision slots for each image in encode; meanwhile one more is decoded, and one more attended to


class Size(StrEnum):
    """Group requests by what is known of their bodies before they are read.

    Refusals of each group are counted apart, so that new images do not close the door to small questions.
    """

    SMALL = "small"
    LARGE = "large"
    UNKNOWN = "unknown"  # the body comes in chunks, or in messages of gRPC

    @classmethod
    def of(cls, nbytes: int | None) -> Size:
        """`nbytes` are declared for the body; None if none are."""
        if nbytes is None:
            return cls.UNKNOWN
        return cls.LARGE if nbytes > SMALL_QUESTION_BYTES else cls.SMALL


class Admission:
    """Own the quota, the queues and the reservations of all requests. Used from one event loop."""

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
        self.llm_tokens = settings.llm_tokens or engines.llm_rows * max_positions
        self.row_tokens = self.llm_tokens // engines.llm_rows  # a request takes a whole row, however short it is
        self.batch_turns = BatchTurns(max(1, engines.llm_rows // BATCH_SHARE))
        tokens = max(settings.max_requests_in_flight * self.row_tokens, max_positions)
        self.quota = quota = Quota(Cost(settings.max_bytes_in_flight, settings.max_pixels_in_flight, tokens))
        self.kept_for_small_bodies = Cost(nbytes=settings.max_bytes_in_flight - settings.max_upload_bytes_in_flight)
        now = time.monotonic()
        self.contention = Contention(settings.fidelity_target_s, now)
        self.limit = limit = ConcurrencyLimit(vision_slots + engines.llm_rows, self.contention)
        self.scheduler = scheduler = scheduling(vision_slots, self.llm_tokens, limit=limit)
        self.fidelity = Fidelity(settings.fidelity_target_s if settings.elastic_fidelity else math.inf, now)
        self._observed_at = -math.inf
        self._later: asyncio.TimerHandle | None = None  # of the next look for the longest wait
        self._strain = "calm"  # kind of the last longest wait: "waiting" in a queue, or "late" by contention
        self._metrics = metrics
        self._grants: dict[Claim, asyncio.Future[None]] = {}  # of the claims that wait
        self._open: set[Reservation] = set()
        self.is_ending = False
        # Time of the last refusal after reading, by size.
        self._refused_at = dict.fromkeys(Size, -math.inf)
        # Time until which the loop is busy with such refusals, at READ_REFUSAL_S each.
        self._refusals_end = dict.fromkeys(Size, -math.inf)
        for kind in Kind:
            metrics.requests_waiting.labels(kind).set_function(partial(scheduler.waiting, kind))
            metrics.requests_running.labels(kind).set_function(partial(scheduler.running, kind))
        for resource in Resource:
            metrics.resource_used.labels(resource).set_function(partial(scheduler.used, resource))
        for unit in Cost._fields:
            metrics.admitted_cost.labels(unit).set_function(partial(quota.holds, unit))
        metrics.concurrency_limit.set_function(lambda: limit.width)
        metrics.fidelity_level.set_function(lambda: LEVELS.index(self.level_now()))

    def level_now(self) -> Level:
        """Bring the level of fidelity up to date -> the level: the most tokens that a request may get now."""
        return LEVELS[self._observe(time.monotonic())]

    @contextmanager
    def reservation(
        self, tenant: str, size: Size | None = None, within: Reservation | None = None
    ) -> Iterator[Reservation]:
        """Open a reservation, which holds nothing yet. When the block ends, it gives everything back.

        `size` is what `refuse_early` was told; None for what did not come through a door. `within` is that of the
        batch, or of the message, that this one is a part of.
        """
        reservation = Reservation(self, tenant, size, within)
        self._open.add(reservation)
        try:
            with reservation.work():
                yield reservation
        finally:
            reservation.close()
            self._open.discard(reservation)

    @property
    def is_busy(self) -> bool:
        """Return whether there are requests."""
        return bool(self._open)

    def refuse_early(self, open_requests: int, lag_s: float, size: Size) -> None:
        """Check that one more request is worth reading. Raises Overloaded.

        A refusal after the body was read and parsed takes as much of the loop as an answer. If many callers are refused
        and ask again, that alone would take all of it, and neither answers nor refusals would be in time. So a crowd is
        refused unread while the loop is late, while the quota has no room, and for a moment after a refusal. Callers
        who are refused at once and ask again are never many at one moment: while the loop is late, the rate of such
        refusals has a limit of its own, for each size.
        """
        if self.quota.closed:
            return
        now, is_late = time.monotonic(), lag_s > MAX_LAG_S
        if is_late and now < self._refusals_end[size] - READ_REFUSALS * READ_REFUSAL_S:
            text = "the server is refusing too many requests to read another one: try again in a few seconds"
            raise self.refuse(Refusal("saturated", text, 1.0))
        if open_requests <= UNHURRIED:
            return
        no_room = self.quota.refusal(Cost(tokens=self.row_tokens), "")
        if no_room is not None or is_late or now < self._refused_at[size] + REFUSAL_PAUSE_S:
            text = f"the server has {open_requests} open requests and cannot take more now: try again in a few seconds"
            raise self.refuse(no_room or Refusal("saturated", text, 1.0))

    def stop(self) -> None:
        """Refuse new requests from now on. Requests that hold something may finish."""
        self.quota.closed = True

    def end(self) -> None:
        """End the requests that still run, wherever they wait: see `Reservation.until_end`."""
        self.stop()
        self.is_ending = True
        for reservation in self._open:
            reservation.interrupt()

    def refuse(self, refusal: Refusal, reservation: Reservation | None = None) -> Overloaded:
        """Count a refusal -> its error. `reservation` is that of the refused request, if it has one."""
        retry_after_s = min(max(refusal.retry_after_s, 1.0), MAX_RETRY_AFTER_S)
        kind = ShuttingDown if refusal.code == ShuttingDown.code else Overloaded
        error = kind(refusal.message, retry_after_s=retry_after_s, code=refusal.code)
        self._metrics.refusals.labels(refusal.code if reservation is None else reservation.reason_for(error)).inc()
        return error

    async def grant(self, claim: Claim) -> None:
        """Wait until the claim is granted.

        Raises Overloaded if the grant would come too late, DeadlineExceeded if the deadline has passed.
        """
        now = time.monotonic()
        if (refusal := self.scheduler.submit(claim, now)) is not None:
            self._note_read_refusal(claim, now)
            raise _over() if now >= claim.deadline else self.refuse(refusal, _reservation_of(claim))
        self.schedule(now)
        if claim.granted_at is None and not claim.over:
            grant = self._grants[claim] = asyncio.get_running_loop().create_future()
            await grant
        if claim.granted_at is None:
            if time.monotonic() >= claim.deadline:
                raise _over()
            raise self.refuse(self.scheduler.expired(claim), _reservation_of(claim))

    def _note_read_refusal(self, claim: Claim, now: float) -> None:
        reservation = _reservation_of(claim)
        size = None if reservation is None else reservation.size
        if size is not None:
            self._refused_at[size] = now
            latest = now + 2 * READ_REFUSALS * READ_REFUSAL_S
            self._refusals_end[size] = min(max(now, self._refusals_end[size]) + READ_REFUSAL_S, latest)

    def release(self, claims: Sequence[Claim], now: float, *, finished: bool) -> None:
        """End the claims. This wakes no waiting request: call `schedule` after all related claims are released."""
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
        """Update the level of fidelity from the longest wait -> the level from now on.

        Finding the longest wait scans all requests, so do it at most once per OBSERVE_S. The controller assumes no
        change in between.
        """
        before = self.fidelity.level
        if now < self._observed_at + OBSERVE_S:
            if self._later is None:
                self._later = asyncio.get_running_loop().call_later(OBSERVE_S, self._observe_later)
            return before
        self._observed_at = now
        since = {"waiting": self.scheduler.waiting_since(now), "late": self.contention.waiting_since(now)}
        waits = {strain: began for strain, began in since.items() if began is not None}
        level = self.fidelity.observe(now, min(waits.values(), default=None))
        if level != before:
            self._metrics.fidelity_changes.inc()
            most = LEVELS[level]
            log.info(
                "fidelity",
                fidelity_level=level,
                reason=self._strain if level > before else "calm",
                vision_tokens=most.vision_tokens,
                visual_tokens=most.visual_tokens,
                frames=most.frames,
            )
        self._strain = min(waits, key=waits.__getitem__, default="calm")
        return level

    def _observe_later(self) -> None:
        self._later = None
        self._observe(time.monotonic())


class Reservation:
    """Hold everything of one request: its cost in the quota, and its claims on the scheduler's resources."""

    def __init__(
        self, admission: Admission, tenant: str, size: Size | None = None, within: Reservation | None = None
    ) -> None:
        self.tenant = tenant
        self.size = size
        self._admission = admission
        self._arrived = time.monotonic()
        self._cost = Cost()
        self._within = within
        self._inside: bool = within is not None and within._inside  # True once admitted: it may finish after `stop`
        self._claims: list[Claim] = []
        self._waits = 0  # number of its waits for results of other requests
        self._deadline = math.inf
        self.held = ExitStack()  # what is let go of when the request is over, and so is all work that it left behind
        self._is_over = False
        self._left_behind = 0  # number of works that go on without the request
        self._over_bytes = 0  # to give back when that work has ended
        self.account: Account = UNLIMITED  # of its tenant's quota
        self.served: Served | None = None  # which variant answers; None until one was chosen
        self.patience = NO_PATIENCE
        self.is_hurried = False  # see Request
        self._ends: list[asyncio.Timeout] = []  # of the blocks that `interrupt` can leave, the innermost last

    def until_end(self, timeout_s: float | None = None) -> UntilEnd:
        """End the block when the service ends its requests.

        Blocks may be nested. Only the innermost one ends, and those around it can still write to the caller. Raises
        ShuttingDown, or TimeoutError after `timeout_s`.
        """
        return UntilEnd(self._admission, self._ends, timeout_s)

    def interrupt(self) -> None:
        """End the innermost block of `until_end`."""
        if self._ends and not self._ends[-1].expired():  # one whose own time is over ends anyway
            self._ends[-1].reschedule(asyncio.get_running_loop().time())

    def reason_for(self, refusal: Overloaded) -> str:
        """Return the reason under which a refusal is counted."""
        if self.patience.waits_for(refusal):
            return BATCH_WAIT
        return SHORT_DEADLINE if self.is_hurried and refusal.code == "deadline" else refusal.code

    def require_room(self, cost: Cost, *, keep_free: Cost = NOTHING) -> None:
        """Check that the cost could be reserved now, but reserve nothing. Raises Overloaded."""
        quota = self._admission.quota
        if (refusal := quota.refusal(cost, self.tenant, inside=self._inside, keep_free=keep_free)) is not None:
            raise self._admission.refuse(refusal, self)
        self._inside = True

    @property
    def nbytes(self) -> int:
        """Return the reserved bytes."""
        return self._cost.nbytes

    def refusal_of(self, cost: Cost, claims: Sequence[Claim]) -> Refusal | None:
        """Return why this cost or these claims, in addition, would be refused now. It reserves and counts nothing."""
        admission, now = self._admission, time.monotonic()
        if (refusal := admission.quota.refusal(cost, self.tenant)) is not None:
            return refusal
        refusals = (admission.scheduler.refusal(claim, now) for claim in claims)
        return next((refusal for refusal in refusals if refusal is not None), None)

    def reserve(self, cost: Cost, *, keep_free: Cost = NOTHING) -> None:
        """Reserve this cost too, until the `work` around it ends. Raises Overloaded."""
        now, quota = time.monotonic(), self._admission.quota
        refusal = quota.reserve(cost, self.tenant, now, inside=self._inside, keep_free=keep_free)
        if refusal is not None:
            raise self._admission.refuse(refusal, self)
        self._cost = self._cost.plus(cost)
        self._inside = True

    def require_bytes(self, nbytes: int) -> None:
        """`require_room` for a body of this size."""
        self.require_room(Cost(nbytes=nbytes), keep_free=self._kept_free(nbytes))

    def reserve_bytes(self, nbytes: int) -> None:
        """Reserve more bytes of a request's body. Raises Overloaded."""
        self.reserve(Cost(nbytes=nbytes), keep_free=self._kept_free(self._cost.nbytes + nbytes))

    def _kept_free(self, nbytes: int) -> Cost:
        """Return what a body of this size must leave to small ones."""
        return NOTHING if nbytes <= SMALL_BODY_BYTES else self._admission.kept_for_small_bodies

    @contextmanager
    def work(self) -> Iterator[None]:
        """When the block ends, give back all claims and the cost reserved inside it. Keep the cost from before."""
        before = self._cost
        try:
            yield
        except BaseException:
            self._give_back_all(answered=False, keep=before)
            raise
        self._give_back_all(answered=True, keep=before)

    async def enter(self, claim: Claim) -> None:
        """Wait for the grant, and hold it until `give_back` or until the `work` around it ends.

        Raises Overloaded, DeadlineExceeded.
        """
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
        """End a granted claim. Pass `finished=False` if its work was not done to the end."""
        self._claims.remove(claim)
        self._pause_or_resume()
        now = time.monotonic()
        self._admission.release([claim], now, finished=finished)
        self._admission.schedule(now)

    @property
    def service_is_ending(self) -> bool:
        """Return whether the service ends its requests."""
        return self._admission.is_ending

    def hand_over(self, claim: Claim, cost: Cost = NOTHING, *, finished: bool = True) -> Callable[[], None]:
        """Let go of a granted claim, and of a reserved cost, whose work goes on without the request.

        That work may use the request's body and what it holds: these are kept as long. Returns the call that gives all
        back. `finished` is false if the claim's work is not all done by then.
        """
        self._claims.remove(claim)
        self._cost = self._cost.minus(cost)
        self._leave_behind(1)
        self._pause_or_resume()
        admission = self._admission

        def give_back() -> None:
            now = time.monotonic()
            self._leave_behind(-1)
            admission.quota.give_back(cost, self.tenant, now)
            admission.release([claim], now, finished=finished)
            admission.schedule(now)

        return give_back

    @contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """Mark the block as a wait for another request's result."""
        self._waits += 1
        if self._pause_or_resume():
            self._admission.schedule(time.monotonic())
        try:
            yield
        finally:
            self._waits -= 1
            self._pause_or_resume()

    def _pause_or_resume(self) -> bool:
        """Count the request as paused if it has no claim and waits for others, else as working.

        Returns whether the change makes room for another request.
        """
        contention = self._admission.contention
        if self._waits and not self._claims:
            return contention.pause(self)
        contention.resume(self)
        return False

    def _leave_behind(self, works: int) -> None:
        """Count work that goes on without the request; it uses what the message or batch around it holds, too."""
        self._left_behind += works
        self._let_go(time.monotonic())
        if self._within is not None:
            self._within._leave_behind(works)

    def close(self) -> None:
        """End the request."""
        self._is_over = True
        self._let_go(time.monotonic())

    def _let_go(self, now: float) -> None:
        """Give back the body, and then what is held, once nothing that the request left behind uses them."""
        if self._left_behind:
            return
        self._admission.quota.give_back(Cost(nbytes=self._over_bytes), self.tenant, now)
        self._over_bytes = 0
        if self._is_over:
            self.held.close()

    def _give_back_all(self, *, answered: bool, keep: Cost) -> None:
        """Give back everything except `keep`. `answered` is false if the request did not get its answer."""
        now, admission = time.monotonic(), self._admission
        over = self._cost.minus(keep)
        admission.quota.give_back(over._replace(nbytes=0), self.tenant, now)
        self._cost, self._over_bytes = keep, self._over_bytes + over.nbytes
        self._let_go(now)
        if self._claims or self in admission.contention:
            admission.release(self._claims, now, finished=answered)
            admission.limit.end(self, now, answered=answered, missed=now >= self._deadline)
            self._claims = []
            admission.schedule(now)


class UntilEnd:
    """The block of `Reservation.until_end`. No generator, because each response of the LLM enters one."""

    def __init__(self, admission: Admission, ends: list[asyncio.Timeout], timeout_s: float | None) -> None:
        self._admission = admission
        self._ends = ends
        self._timeout = asyncio.timeout(0 if admission.is_ending else timeout_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._ends.append(self._timeout)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.remove(self._timeout)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as exc:
            if not self._admission.is_ending:
                raise
            raise ShuttingDown(
                "this server stopped before the request was done: try again, another server answers"
            ) from exc


def _reservation_of(claim: Claim) -> Reservation | None:
    return claim.request if isinstance(claim.request, Reservation) else None


def _over() -> DeadlineExceeded:
    return DeadlineExceeded(
        "timeout_s was over before the request could start: raise timeout_s, or try again when the service is less "
        "busy",
        param="timeout_s",
    )
