"""End each request in exactly one outcome: one metric and one log line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from service.admission.admission import Reservation
from service.admission.patience import Patience
from service.core.errors import (
    BATCH_WAIT,
    SHORT_DEADLINE,
    Cancelled,
    DeadlineExceeded,
    GlimpseError,
    InternalError,
    Overloaded,
    internal_error,
)
from service.core.payer import Payer
from service.core.request import Request
from service.core.variant import DEFAULT
from service.core.vision import TENSIONS, Sight
from service.record.ticket import Ticket
from service.telemetry.costs import Ended
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Generated

if TYPE_CHECKING:
    from service.telemetry.spans import Trace, Traces

log = structlog.get_logger()

OVER = ("deadline", DeadlineExceeded.code)  # outcomes of a request whose time was too short
# With these outcomes the LLM stopped early: the caller would not have read the remaining tokens.
NOTHING_MORE_TO_DO = ("cancelled", "deadline", "deadline_exceeded", SHORT_DEADLINE)


class Outcomes:
    """Count and log the outcomes of all requests. Made once by the pipeline."""

    def __init__(self, metrics: Metrics, traces: Traces | None = None, *, always_streams: bool = False) -> None:
        """`always_streams` says that the LLM sends tokens one by one, whatever a request says."""
        self.metrics = metrics
        self.traces = traces
        self.always_streams = always_streams

    @contextmanager
    def of(self, request: Request, reservation: Reservation) -> Iterator[Ticket]:
        """Open the request's ticket, and count and log its outcome when the block ends.

        An unknown error becomes InternalError. If the reservation's patience waits for a refusal, the question has
        not ended.
        """
        now = time.monotonic()
        ticket = Ticket(request, reservation, now, now + request.timeout_s, self.always_streams)
        ticket.payer = self.metrics.costs.payer(request.tenant)
        if self.traces is not None:
            ticket.trace = self.traces.request(request.traceparent)
        fault: Exception | None = None
        try:
            yield ticket
        except GlimpseError as error:
            ticket.outcome, fault = _outcome_of(error, reservation.patience), error
            raise
        except Exception as error:
            ticket.outcome, fault = InternalError.code, error
            raise internal_error(request.trace_id or request.id) from error
        finally:
            if ticket.outcome == Cancelled.code and ticket.left_s <= 0:
                ticket.outcome = DeadlineExceeded.code  # the edge's timeout came first: the loop stood still
            if request.is_hurried and ticket.outcome in OVER:
                ticket.outcome = SHORT_DEADLINE
            self._count(ticket)
            _log(ticket, fault)
            if ticket.trace is not None:
                _end_trace(ticket, ticket.trace)

    def answered(self, ticket: Ticket, seen: Sight) -> None:
        """Record that the request was answered, from these visual tokens of its images and its clip."""
        ticket.outcome = "ok"
        if seen.frames:
            self.metrics.clip_frames.observe(len(seen.frames))
        for shown in seen.seen:
            self.metrics.vision_tokens.observe(shown.vision_tokens)
            self.metrics.visual_tokens.observe(len(shown.visual_tokens))
        for each in (*seen.images, *seen.of_frames):
            self.metrics.images_seen.labels(each.detail).inc()
            self.metrics.relevance_evenness.observe(each.relevance.evenness)
            for name, tension in zip(TENSIONS, each.relevance.tensions, strict=True):
                self.metrics.tension.labels(name).observe(tension)
        if ticket.reduced:
            self.metrics.reduced_answers.inc()
        ticket.tell(
            vision_tokens=sum(each.vision_tokens for each in seen.seen),
            visual_tokens=ticket.visual_tokens,
        )

    def _count(self, ticket: Ticket) -> None:
        timing_ms = ticket.timing_ms()
        ended = Ended(
            answered=ticket.outcome == "ok",
            waits=ticket.outcome == BATCH_WAIT,
            streamed=ticket.streams,
            encoded_images=ticket.encoded,
            prompt_tokens=ticket.prompt_tokens,
            visual_tokens=ticket.visual_tokens,
            generated_tokens=ticket.completion_tokens,
        )
        self.metrics.costs.ended(Payer(ticket.payer.tenant, ticket.variant), ended)
        if ticket.outcome != BATCH_WAIT:  # the question has not ended: it is asked again
            self.metrics.requests.labels(ticket.outcome, ticket.variant).inc()
        self.metrics.prompt_tokens.labels(ticket.variant).inc(ticket.prompt_tokens)
        self.metrics.generated_tokens.labels(ticket.variant).inc(ticket.completion_tokens)
        if ticket.outcome == "ok":
            exemplar = {"trace_id": ticket.trace.id} if ticket.trace is not None else None
            self.metrics.e2e_request_latency.labels(ticket.variant).observe(timing_ms["total"] / 1e3, exemplar)
            if ticket.streams:
                first_s = timing_ms["first_token"] / 1e3
                self.metrics.time_to_first_token.labels(ticket.variant).observe(first_s, exemplar)
            if ticket.kind is not None:
                self.metrics.request_queue_time.labels(ticket.kind).observe(timing_ms["queue"] / 1e3)
            for name, stage in ticket.stages.items():
                self.metrics.stage.labels(name).observe(stage.seconds)
        elif ticket.tokens and ticket.outcome in NOTHING_MORE_TO_DO:
            saved = ticket.request.sampling.max_tokens - ticket.completion_tokens
            self.metrics.tokens_saved.labels(ticket.outcome).inc(saved)


def _outcome_of(error: GlimpseError, patience: Patience) -> str:
    return BATCH_WAIT if isinstance(error, Overloaded) and patience.waits_for(error) else error.code


def _log(ticket: Ticket, fault: Exception | None) -> None:
    foreseen = fault is None or isinstance(fault, GlimpseError)
    (log.info if foreseen else log.error)(
        "answered" if ticket.outcome == "ok" else "not_answered",
        outcome=ticket.outcome,
        request_id=ticket.request.trace_id,
        id=ticket.request.id,
        tenant=ticket.request.tenant,
        image_ids=",".join(ticket.image_ids),
        cache=ticket.cache,
        detail=ticket.detail,
        fit=ticket.fit,
        reduced=ticket.reduced,
        **({"frames": ticket.frames} if ticket.frames else {}),
        completion_tokens=ticket.completion_tokens,
        **{f"{name}_ms": value for name, value in ticket.timing_ms().items()},
        **({"variant": ticket.variant} if ticket.variant != DEFAULT else {}),
        **({"fallback_from": ticket.fallback_from} if ticket.fallback_from else {}),
        **({"trace_id": ticket.trace.id} if ticket.trace is not None else {}),
        **told_of(fault),
    )


def _end_trace(ticket: Ticket, trace: Trace) -> None:
    request = ticket.request
    trace.end(
        ticket.outcome,
        {
            "request_id": request.trace_id,
            "id": request.id,
            "images": len(request.images),
            "frames": ticket.frames,
            "cache": ticket.cache,
            "detail": ticket.detail,
            "fit": ticket.fit,
            "reduced": ticket.reduced,
            "encoded_images": ticket.encoded,
            "prompt_tokens": ticket.prompt_tokens,
            "completion_tokens": ticket.completion_tokens,
            "variant": ticket.variant,
            **({"fallback_from": ticket.fallback_from} if ticket.fallback_from else {}),
        },
        Generated(
            asked_model=ticket.asked_model,
            model=ticket.model,
            input_tokens=ticket.prompt_tokens + ticket.visual_tokens,
            output_tokens=ticket.completion_tokens,
            finish_reason=ticket.finish_reason if ticket.outcome == "ok" else "",
        ),
    )


def told_of(fault: Exception | None) -> dict[str, object]:
    """Return the log's fields for a fault: message and cause of a GlimpseError, the traceback of any other error."""
    match fault:
        case None:
            return {}
        case GlimpseError():
            return {"error": fault.message, "cause": fault.cause} if fault.cause else {"error": fault.message}
        case _:
            return {"exc_info": fault}
