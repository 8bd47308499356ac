"""Record the model's own spans below the span of the gateway's call, which arrives as a parameter of the request.

Off unless GLIMPSE_OTLP_ENDPOINT is set in Triton's environment. The gateway decides which requests are traced: a
request without the parameter has no span here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    return spans.start(model, parent) if parent else None


def end(span: Span, fault: str = "") -> None:
    """End a span, as failed if there is a fault: a word for it, without a message."""
    if fault:
        from service.telemetry.spans import set_failed  # noqa: PLC0415 - loaded already: there is a span

        set_failed(span, fault)
    span.end()


@contextmanager
def spans(model: str, requests: Sequence[Any]) -> Iterator[None]:
    """Record the block as a span of each traced request. The spans of one batch have the same time and its size."""
    begun = [span for request in requests if (span := begin(model, request)) is not None]
    for span in begun:
        span.set_attribute("glimpse.batch", len(requests))
    fault = ""
    try:
        yield
    except Exception as error:
        fault = type(error).__name__
        raise
    finally:
        for span in begun:
            end(span, fault)
