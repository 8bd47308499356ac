"""Record the model's own spans below the span of the gateway's call, which arrives as a parameter of the request.

Off unless GLIMPSE_OTLP_ENDPOINT is set in Triton's environment. The gateway decides which requests are traced: a
request without the parameter has no span here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from service.telemetry.tracing import TRACEPARENT

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from service.telemetry.spans import Spans

ENDPOINT = "GLIMPSE_OTLP_ENDPOINT"


@cache
def _spans(model: str) -> Spans | None:
    """One a process: Triton runs each model in its own."""
    endpoint = os.environ.get(ENDPOINT, "")
    if not endpoint:
        return None
    from service.telemetry.spans import Spans  # noqa: PLC0415 - a model without traces does not need it

    return Spans(endpoint, f"glimpse-{model}")


def begin(model: str, request: Any) -> Span | None:
    """Start the model's span of a request. None if it is not traced. Who starts a span ends it."""
    spans = _spans(model)
    if spans is None:
        return None
    parent = json.loads(request.parameters() or "{}").get(TRACEPARENT, "")
    return spans.start(model, parent) if parent and isinstance(parent, str) else None  # clients can send any value


def end(span: Span, fault: str = "") -> None:
    """End a span, as failed if there is a fault: a word for it, without a message."""
    if fault:
        from service.telemetry.spans import set_failed  # noqa: PLC0415 - loaded already: there is a span

        set_failed(span, fault)
    span.end()


def recorded(model: str, requests: Sequence[Any], run: Callable[[], list[Any]]) -> list[Any]:
    """Record `run` as a span of each traced request -> its responses, one a request. A span fails with its response.

    The spans of one batch have the same time and its size.
    """
    begun = [begin(model, request) for request in requests]
    faults = ["model"] * len(requests)
    try:
        responses = run()
        faults = ["model" if response.has_error() else "" for response in responses]
        return responses
    finally:
        for span, fault in zip(begun, faults, strict=True):
            if span is not None:
                span.set_attribute("glimpse.batch", len(requests))
                end(span, fault)


def close(model: str) -> None:
    """Send the spans that have ended, at the model's end; wait a few seconds at most."""
    spans = _spans(model)
    if spans is not None:
        spans.close()
