"""Keep the models' spans in memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.telemetry.spans import Spans

TRACED = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}  # the parameters of a request that is traced


class Recorded(Spans):
    """The spans of a model, which no receiver gets."""

    def __init__(self) -> None:
        self._kept = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self._tracer = self._provider.get_tracer("test")
        self.ended_before_close: int | None = None

    def close(self) -> None:
        self.ended_before_close = len(self.ended())

    def ended(self) -> Sequence[ReadableSpan]:
        """The spans that have ended, in that order."""
        return self._kept.get_finished_spans()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr("triton_models.spans._spans", lambda _: recorded)
    return recorded
