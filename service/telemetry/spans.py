"""Trace requests with OpenTelemetry: one span a request, one a stage, and the models' own spans below them.

Imported only where GLIMPSE_OTLP_ENDPOINT is set. A span has counts, times and outcomes, and never the question, the
image or the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.core.errors import BATCH_WAIT
from service.telemetry.tracing import TRACEPARENT, Generated, Value, current

# Stages that a request enters once a response of the LLM: each is one span from the first entry to the last exit.
LASTING = ("decode", "generate")
EXPORT_INTERVAL_MS = 1000
EXPORT_TIMEOUT_S = 3


class Spans:
    """Start spans of one service, and send them to an OTLP receiver over gRPC, in batches, from a thread of its own.

    A receiver that does not answer costs spans, and never a request.
    """

    def __init__(self, endpoint: str, service: str, share: float = 1.0) -> None:
        """`endpoint` is `http://HOST:4317`, or `https:` for TLS.

        `share` of the traces that start here are recorded. A trace that the caller started follows its decision.
        """
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(share),
            resource=Resource.create({SERVICE_NAME: service}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS))
        self._tracer = self._provider.get_tracer("glimpse")

    def start(self, name: str, parent: str = "") -> Span | None:
        """Start a span below `parent`, which is W3C's text, or a new trace. None if the trace is not recorded."""
        context = TraceContextTextMapPropagator().extract({TRACEPARENT: parent}) if parent else None
        span = self._tracer.start_span(name, context, kind=SpanKind.SERVER)
        return span if span.is_recording() else None

    def below(self, parent: Span, name: str) -> Span:
        return self._tracer.start_span(name, set_span_in_context(parent))

    def close(self) -> None:
        """Send what is left; wait a few seconds at most."""
        self._provider.force_flush(EXPORT_TIMEOUT_S * 1000)
        self._provider.shutdown()


class Traces:
    """Start the traces of a gateway's requests."""

    def __init__(self, endpoint: str, share: float, model: str, *, gen_ai: bool = False) -> None:
        self._spans = Spans(endpoint, "glimpse-gateway", share)
        self._model = model
        self._gen_ai = gen_ai

    def request(self, parent: str) -> Trace | None:
        """Start a request's trace, below the caller's span if `parent` names one. None if it is not recorded."""
        root = self._spans.start("answer", parent)
        return None if root is None else Trace(root, self._spans, self._model if self._gen_ai else None)

    def close(self) -> None:
        self._spans.close()


class Trace:
    """The spans of one request."""

    def __init__(self, root: Span, spans: Spans, gen_ai_model: str | None) -> None:
        self._root = root
        self._spans = spans
        self._gen_ai_model = gen_ai_model
        self._lasting: dict[str, tuple[Span, int]] = {}  # and when it was last left, in ns since the epoch

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._root.get_span_context().trace_id:032x}"

    @contextmanager
    def stage(self, name: str, inner: AbstractContextManager[None]) -> Iterator[None]:
        """Run the block in `inner` and in a span below the current one. Calls to Triton carry that span."""
        before = current.get()
        span = self._lasting[name][0] if name in self._lasting else self._spans.below(before or self._root, name)
        current.set(span)
        try:
            with inner:
                yield
        except Exception as error:
            set_failed(span, error)
            raise
        finally:
            current.set(before)
            if name in LASTING:
                self._lasting[name] = span, time.time_ns()
            else:
                span.end()

    def tell(self, **attributes: Value) -> None:
        """Add attributes to the current span, or to the request's outside every stage."""
        (current.get() or self._root).set_attributes({f"glimpse.{name}": value for name, value in attributes.items()})

    def end_lasting(self, completion_tokens: int) -> None:
        """End the spans of the LLM's stages: of an attempt that another follows, or of the last one."""
        for span, left_ns in self._lasting.values():
            span.set_attribute("glimpse.completion_tokens", completion_tokens)
            span.end(left_ns)
        self._lasting.clear()

    def end(self, outcome: str, attributes: Mapping[str, Value], generated: Generated) -> None:
        """End the request's span."""
        self.end_lasting(generated.output_tokens)
        self._root.set_attribute("glimpse.outcome", outcome)
        self._root.set_attributes({f"glimpse.{name}": value for name, value in attributes.items()})
        if self._gen_ai_model is not None:
            self._root.set_attributes(gen_ai(generated, self._gen_ai_model))
        if outcome not in ("ok", "cancelled", BATCH_WAIT):
            set_failed(self._root, outcome)
        self._root.end()


def gen_ai(generated: Generated, default: str) -> dict[str, Value | list[str]]:
    """Return OpenTelemetry's attributes of a generation. `default` is the model that a request gets if none began."""
    attributes: dict[str, Value | list[str]] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "glimpse",
        "gen_ai.request.model": generated.asked_model or default,
        "gen_ai.usage.input_tokens": generated.input_tokens,
        "gen_ai.usage.output_tokens": generated.output_tokens,
    }
    if generated.model:
        attributes["gen_ai.response.model"] = generated.model
    if generated.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = [generated.finish_reason]
    return attributes


def set_failed(span: Span, error: Exception | str) -> None:
    """Mark the span as failed, by the error's class or its code. Messages may quote a caller, so they are left out."""
    span.set_attribute("error.type", error if isinstance(error, str) else type(error).__name__)
    span.set_status(StatusCode.ERROR)
