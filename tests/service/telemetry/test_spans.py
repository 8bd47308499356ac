"""The spans of one request, as the gateway records them, without Triton and without a receiver."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.core.errors import InvalidRequest, Unavailable
from service.core.request import Sampling
from service.core.variant import Served
from service.telemetry.spans import Traces
from tests.support.fakes import CARD, House, answered, cancelled, until
from tests.support.fakes import asked as request


class Recorded:
    """The traces of a gateway, kept in memory."""

    def __init__(self) -> None:
        self.traces = Traces("http://127.0.0.1:1", 1.0, "of the start", gen_ai=True)
        provider = self.traces._spans._provider
        provider.shutdown()  # nothing is sent
        self._kept = InMemorySpanExporter()
        provider._active_span_processor._span_processors = (SimpleSpanProcessor(self._kept),)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._kept.get_finished_spans() if span.name == name]

    @property
    def root(self) -> dict[str, object]:
        (root,) = self.named("answer")
        return dict(root.attributes or {})


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def house(recorded: Recorded) -> Iterator[House]:
    house = House()
    house.pipeline.outcomes.traces = recorded.traces
    yield house
    house.reader.close()


async def test_an_answer_tells_its_model_and_all_tokens_that_the_llm_read(recorded: Recorded, house: House) -> None:
    await answered(house, request())
    root = recorded.root
    assert root["gen_ai.request.model"] == root["gen_ai.response.model"] == CARD.name
    assert root["gen_ai.usage.input_tokens"] == root["glimpse.prompt_tokens"] + 32
    assert root["gen_ai.response.finish_reasons"] == ("stop",)
    assert root["glimpse.variant"] == "default"
    assert "glimpse.fallback_from" not in root


async def test_a_refused_question_has_no_reason_to_have_ended(recorded: Recorded, house: House) -> None:
    with pytest.raises(InvalidRequest):
        await answered(house, request(sampling=Sampling(max_tokens=1000)))
    root = recorded.root
    assert root["gen_ai.request.model"] == "of the start"
    assert not {"gen_ai.response.model", "gen_ai.response.finish_reasons"} & root.keys()


async def test_a_cancelled_question_has_no_reason_to_have_ended(recorded: Recorded, house: House) -> None:
    house.language.gate.clear()
    task = asyncio.create_task(answered(house, request()))
    await until(lambda: house.language.open)
    await cancelled(task)
    assert "gen_ai.response.finish_reasons" not in recorded.root
    assert recorded.root["gen_ai.response.model"] == CARD.name


@pytest.mark.parametrize("streaming", [True, False])
def test_a_fallbacks_success_is_not_marked_as_failed(recorded: Recorded, house: House, streaming: bool) -> None:
    asked = request(sampling=Sampling(streaming=streaming))
    with house.admission.reservation("") as reservation, house.pipeline.outcomes.of(asked, reservation) as ticket:
        ticket.begin(asked, Served("next", "tiny-next", ""))
        ticket.asked_model = "tiny-next"
        ticket.first_token, ticket.completion_tokens = 1.0, 7
        with suppress(Unavailable), ticket.stage(ticket.writing):
            raise Unavailable("the model llm does not answer")
        ticket.begin(asked, Served("main", "tiny-main", "", fallback_from="next"))
        ticket.first_token, ticket.completion_tokens = 1.0, 3
        with ticket.stage(ticket.writing):
            pass
        ticket.outcome = "ok"
    first, second = recorded.named("decode" if streaming else "generate")
    assert [span.status.status_code for span in (first, second)] == [StatusCode.ERROR, StatusCode.UNSET]
    assert [(span.attributes or {})["glimpse.completion_tokens"] for span in (first, second)] == [7, 3]
    root = recorded.root
    assert (root["glimpse.variant"], root["glimpse.fallback_from"]) == ("main", "next")
    assert (root["gen_ai.request.model"], root["gen_ai.response.model"]) == ("tiny-next", "tiny-main")
