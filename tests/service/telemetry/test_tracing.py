"""One request is one connected trace, from the caller's span to the models' own, at a real OTLP receiver."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from service.core.card import ModelCard
from service.core.errors import InternalError
from service.core.prompt import Question
from service.core.request import Budget
from service.core.vision import IMAGE_SIZE, QUESTION_TOKENS, VisionFeatures
from service.settings import Settings
from service.telemetry.tracing import current
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.support.paths import PROJECT
from tests.support.servers import Gateway, StartGateway, eventually, free_ports
from tests.support.traces import ReceivedSpan, Spans, otlp_receiver

QUESTION = "what character is on the pink square?"
SCENE = (PROJECT / "benchmarks" / "scenes" / "new_003.webp").read_bytes()


@dataclass(frozen=True)
class Traced:
    """A gateway with a Triton of its own, and what it told the receiver."""

    gateway: Gateway
    spans: Spans

    def ask(self, fields: dict[str, Any], sampled: bool = True, **files: bytes) -> tuple[str, str]:
        """Ask below a span of the caller -> the ids of its trace and of that span."""
        trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
        traceparent = f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"
        response = httpx.post(
            f"{self.gateway.url}/v1/vqa",
            data={"question": QUESTION, **fields},
            files={name: ("scene.webp", data) for name, data in files.items()} or None,
            headers={"traceparent": traceparent},
            timeout=60,
        )
        assert response.status_code in (200, 400), response.text
        return trace_id, span_id

    def trace(self, trace_id: str, *names: str) -> dict[str, ReceivedSpan]:
        """The spans of a trace by name, once all of these have come."""
        eventually(
            lambda: {*names} <= {span.name for span in self.spans.of(trace_id)}, 20, f"spans {names} of {trace_id}"
        )
        return {span.name: span for span in self.spans.of(trace_id)}


@pytest.fixture(scope="module")
def traced(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with (
        otlp_receiver(tmp_path_factory.mktemp("rotel")) as (endpoint, spans),
        start_gateway(
            {"GLIMPSE_OTLP_ENDPOINT": endpoint, "GLIMPSE_TRACE_GEN_AI": "true", "GLIMPSE_LOG_FORMAT": "json"}
        ) as gateway,
    ):
        yield Traced(gateway, spans)


def test_a_request_is_one_connected_trace(traced: Traced) -> None:
    trace_id, caller = traced.ask({"stream": "true"}, image=SCENE)
    models = ("vision_encoder", "relevance_allocator", "qformer", "llm")
    spans = traced.trace(trace_id, "answer", "queue", "load", "vision", "lookup", "see", "prefill", "decode", *models)

    names = {span.id: span.name for span in traced.spans.of(trace_id)} | {caller: "caller"}
    parents = {(span.name, names[span.parent]) for span in traced.spans.of(trace_id)}
    assert parents == {
        ("answer", "caller"),
        *((stage, "answer") for stage in ("load", "vision", "queue", "prefill", "decode")),
        ("decode_image", "load"),
        ("lookup", "vision"),
        ("see", "vision"),
        *((model, "see") for model in models[:3]),
        ("llm", "prefill"),
    }
    assert spans["answer"].service == "glimpse-gateway"
    assert spans["llm"].service == "glimpse-llm"
    assert not any(span.failed for span in spans.values())


def test_spans_have_tokens_hits_and_the_outcome(traced: Traced) -> None:
    traced.ask({}, image=SCENE)
    trace_id, _ = traced.ask({"question": "what color is the circle?"}, image=SCENE)
    spans = traced.trace(trace_id, "answer", "lookup", "attend", "llm")
    answer = spans["answer"].attributes

    assert spans["lookup"].attributes["glimpse.hit"] is True
    assert answer["glimpse.outcome"] == "ok"
    assert answer["glimpse.cache"] == "hit"
    assert answer["glimpse.vision_tokens"] == spans["attend"].attributes["glimpse.vision_tokens"] >= 64
    assert answer["glimpse.visual_tokens"] == 32
    assert answer["glimpse.completion_tokens"] >= 1
    assert answer["gen_ai.usage.input_tokens"] == answer["glimpse.prompt_tokens"] + answer["glimpse.visual_tokens"] > 32
    assert answer["gen_ai.request.model"] == answer["gen_ai.response.model"]
    assert answer["glimpse.variant"] == "default"
    assert spans["llm"].attributes["glimpse.completion_tokens"] >= 1


def test_no_span_has_the_question(traced: Traced) -> None:
    trace_id, _ = traced.ask({"question": "is the zyzzyva blue?"}, image=SCENE)
    traced.trace(trace_id, "answer", "llm")
    assert "zyzzyva" not in str(traced.spans.of(trace_id))


def test_a_refused_request_fails_in_its_trace(traced: Traced) -> None:
    trace_id, _ = traced.ask({"max_tokens": 10_000}, image=SCENE)
    answer = traced.trace(trace_id, "answer")["answer"]
    assert answer.failed
    assert answer.attributes["glimpse.outcome"] == answer.attributes["error.type"] != "ok"


def test_the_log_and_openmetrics_name_the_trace(traced: Traced) -> None:
    trace_id, _ = traced.ask({}, image=SCENE)

    def told() -> bool:  # the line is written after the answer
        lines = (json.loads(line) for line in traced.gateway.log().splitlines() if line.startswith("{"))
        return any(line.get("trace_id") == trace_id for line in lines)

    eventually(told, 10, "the log names the trace")

    text = httpx.get(f"{traced.gateway.url}/metrics", headers={"accept": "application/openmetrics-text"}).text
    assert f'trace_id="{trace_id}"' in text
    assert text.endswith("# EOF\n")
    assert "trace_id" not in httpx.get(f"{traced.gateway.url}/metrics").text


def test_a_callers_decision_not_to_record_is_followed(traced: Traced) -> None:
    dropped, _ = traced.ask({}, sampled=False, image=SCENE)
    kept, _ = traced.ask({}, image=SCENE)
    traced.trace(kept, "answer", "llm")  # sent after the first one's would have been
    assert not traced.spans.of(dropped)


def of(triton: EmbeddedTriton) -> dict[str, str]:
    """The settings of a gateway in front of this Triton, which records nothing."""
    return {"GLIMPSE_VISION_URL": triton.access.url, "GLIMPSE_LLM_URL": triton.access.url}


def untraced(gateway: Gateway) -> None:
    """Ask without a span of the caller."""
    files = {"image": ("scene.webp", SCENE)}
    assert httpx.post(f"{gateway.url}/v1/vqa", data={"question": QUESTION}, files=files, timeout=60).is_success


def test_a_share_of_none_leaves_what_callers_record_and_gen_ai_is_off_by_default(
    triton: EmbeddedTriton, start_gateway: StartGateway, tmp_path: Path
) -> None:
    with (
        otlp_receiver(tmp_path) as (endpoint, spans),
        start_gateway({"GLIMPSE_OTLP_ENDPOINT": endpoint, "GLIMPSE_TRACE_SHARE": "0", **of(triton)}) as gateway,
    ):
        untraced(gateway)
        traced = Traced(gateway, spans)
        recorded, _ = traced.ask({}, image=SCENE)
        answer = traced.trace(recorded, "answer")["answer"]
        assert {span.trace_id for span in spans.received} == {recorded}
        assert not [name for name in answer.attributes if name.startswith("gen_ai")]


async def test_a_models_span_fails_with_its_response(
    repository: Path, card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = card.feature_shapes[IMAGE_SIZE]
    blank = VisionFeatures(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    question, frames = Question(*np.zeros((2, QUESTION_TOKENS), np.int32)), card.most_frames + 1
    trace_id = secrets.randbits(128) | 1
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    with otlp_receiver(tmp_path) as (endpoint, spans):
        monkeypatch.setenv("GLIMPSE_OTLP_ENDPOINT", endpoint)
        async with (
            TritonClient(access.url, access.url) as client,
            EmbeddedTriton(repository, client=client, card=card, log_path=tmp_path / "log", access=access),
        ):
            current.set(NonRecordingSpan(SpanContext(trace_id, 1, is_remote=False, trace_flags=TraceFlags(1))))
            with pytest.raises(InternalError):
                await client.attend_clip([blank] * frames, [0.0] * frames, question, Budget(), timeout_s=20)
            current.set(None)
        eventually(lambda: spans.of(f"{trace_id:032x}"), 5, "the span is passed on")
    (span,) = spans.of(f"{trace_id:032x}")
    assert (span.name, span.failed) == ("attend_clip", True)


def test_without_an_endpoint_neither_recorder_nor_exporter_is_loaded(
    triton: EmbeddedTriton, start_gateway: StartGateway
) -> None:
    """FastAPI and Redis's client import OpenTelemetry's interface, which records nothing by itself."""
    with start_gateway({"PYTHONPROFILEIMPORTTIME": "1", **of(triton)}) as gateway:  # Python's log of every import
        untraced(gateway)
        imported = {line.rpartition("|")[2].strip() for line in gateway.log().splitlines() if "import time:" in line}
    assert "service.telemetry.tracing" in imported
    recorders = ("service.telemetry.spans", "opentelemetry.sdk.trace", "opentelemetry.exporter")
    assert not [name for name in imported if name.startswith(recorders)]


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://localhost", "ftp://localhost:4317"])
def test_an_endpoint_that_cannot_be_one_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:4317"):
        Settings(otlp_endpoint=endpoint)
