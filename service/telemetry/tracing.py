"""Know the current span of a traced request, without OpenTelemetry: `spans` records it where traces are on."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"  # W3C Trace Context: the HTTP header, and the parameter of a request to Triton
Value = str | int | float | bool

current: ContextVar[Span | None] = ContextVar("current span", default=None)


class Generated(NamedTuple):
    """Say what OpenTelemetry's `gen_ai` attributes need of one request."""

    asked_model: str  # of the variant that should answer; empty if no attempt began
    model: str  # of the variant that answered last; likewise
    input_tokens: int  # text and visual tokens of the prompt
    output_tokens: int
    finish_reason: str  # empty without a complete answer


def traceparent() -> str:
    """The current span in W3C's form, or an empty text if no trace is recorded."""
    span = current.get()
    if span is None:
        return ""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
