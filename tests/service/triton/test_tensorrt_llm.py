"""The client and the pipeline against a stand-in of TensorRT-LLM's backend. The backend itself never ran here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from service.core.answer import Delta, Finished, LogProb
from service.core.errors import InternalError, InvalidRequest, Overloaded
from service.core.guide import guide_of
from service.core.models import Generation
from service.core.prompt import Prompt
from service.core.request import Budget, ImageBytes, Request, Sampling, Text
from service.triton import TritonClient
from tests.support.fakes import CARD, House, ids_of, png
from tests.support.tensorrt_llm import TensorRtLlm, listening, log_prob

pytestmark = pytest.mark.asyncio(loop_scope="session")

ENGINE = replace(CARD, text_type="BYTES", top_log_probs=False, guides=False, most_visual_tokens=64)
RED = ids_of(" red é")


@asynccontextmanager
async def asking(model: TensorRtLlm) -> AsyncIterator[TritonClient]:
    async with listening(model) as address, TritonClient(address, address, text_type=ENGINE.text_type) as client:
        yield client


@asynccontextmanager
async def house(model: TensorRtLlm) -> AsyncIterator[House]:
    """A whole service whose LLM is the stand-in."""
    async with asking(model) as client:
        served = House(ENGINE)
        served.pipeline.models.models[0].language = client
        yield served


def generation(sampling: Sampling, log_probs: list[LogProb] | None = None, rows: int = 2) -> Generation:
    ids = np.array([*range(ENGINE.vocab_size, ENGINE.vocab_size + rows), 5], np.int32)
    table = np.linspace(0, 1, rows * ENGINE.hidden_size, dtype=np.float32).reshape(rows, -1)
    extra = np.array([*range(1, rows + 1), 0], np.uint64)
    return Generation(
        Prompt(ids, table, extra), sampling, end_id=ENGINE.end_id, pad_id=ENGINE.pad_id, request_id="r",
        stall_timeout_s=5, log_probs=log_probs,
    )  # fmt: skip


def question(**sampling: object) -> Request:
    return Request(
        id="vqa_1",
        parts=(ImageBytes(png()), Text("what?")),
        budget=Budget((64, 256), (32, 32)),
        sampling=Sampling(**{"max_tokens": 16} | sampling),
        timeout_s=20,
    )


async def ask(served: House, request: Request) -> tuple[list[Delta], Finished]:
    *deltas, end = [event async for event in served.answer(request)]
    return deltas, end


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("said", [0, 1, 5])
async def test_an_answer_ends_with_the_end_id_although_it_is_never_sent(streaming: bool, said: int) -> None:
    async with asking(TensorRtLlm(RED[:said])) as client:
        pieces = [piece async for piece in client.generate(generation(Sampling(8, streaming=streaming)), 20)]
    assert [token for piece in pieces for token in piece] == [*RED[:said], ENGINE.end_id]


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_answer_that_is_cut_has_no_end_id(streaming: bool) -> None:
    async with asking(TensorRtLlm(RED)) as client:
        pieces = [piece async for piece in client.generate(generation(Sampling(3, streaming=streaming)), 20)]
        assert [token for piece in pieces for token in piece] == RED[:3]
        endless = replace(generation(Sampling(8)), end_id=-1)  # as `glimpse verify` asks
        assert [token async for piece in client.generate(endless, 20) for token in piece] == RED


@pytest.mark.parametrize("streaming", [True, False])
async def test_each_token_has_its_own_log_probability_although_all_are_told_each_time(streaming: bool) -> None:
    told: list[LogProb] = []
    sampling = Sampling(8, streaming=streaming, log_probs=True)
    async with asking(TensorRtLlm(RED[:4])) as client:
        async for _ in client.generate(generation(sampling, told), 20):
            pass
    assert told == [LogProb(log_prob(place)) for place in range(4)]


async def test_a_full_queue_of_its_own_is_overload() -> None:
    model = TensorRtLlm(RED)
    model.is_full = True
    async with asking(model) as client:
        with pytest.raises(Overloaded):
            async for _ in client.generate(generation(Sampling(8)), 20):
                pass


async def test_it_can_be_probed() -> None:
    for tokens in ([], RED):
        async with asking(TensorRtLlm(tokens)) as client:
            await client.probe("llm", replace(ENGINE, float_type="FP16"))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("max_tokens", "text", "reason"), [(16, "red é", "stop"), (1, "red", "length"), (len(RED), "red é", "length")]
)
async def test_a_caller_is_told_whether_the_answer_is_whole(
    streaming: bool, max_tokens: int, text: str, reason: str
) -> None:
    async with house(TensorRtLlm(RED)) as served:
        deltas, end = await ask(served, question(max_tokens=max_tokens, streaming=streaming, log_probs=True))
    assert "".join(delta.text for delta in deltas) == text
    assert end.finish_reason == reason
    told = [each.log_prob for delta in deltas for each in delta.log_probs]
    assert told == [log_prob(place) for place in range(len(told))]
    assert len(told) == end.completion_tokens == min(max_tokens, len(RED))


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_empty_answer_is_an_answer(streaming: bool) -> None:
    async with house(TensorRtLlm([])) as served:
        deltas, end = await ask(served, question(streaming=streaming))
    assert "".join(delta.text for delta in deltas) == ""
    assert (end.finish_reason, end.completion_tokens) == ("stop", 0)


async def test_more_visual_tokens_than_the_engine_takes_never_reach_it() -> None:
    """There they would fail every request of the batch."""
    model = TensorRtLlm(RED, most_visual_tokens=64)
    async with house(model) as served:
        one = question()
        assert (await ask(served, replace(one, parts=(ImageBytes(png()), *one.parts))))[1].visual_tokens == 64
        with pytest.raises(InvalidRequest, match="96 visual tokens of 3 images, tiny has room for 64") as caught:
            await ask(served, replace(one, parts=(*[ImageBytes(png())] * 2, *one.parts)))
        assert (caught.value.param, caught.value.code) == ("images", "context_length_exceeded")
        with pytest.raises(InternalError):
            async for _ in served.pipeline.models.primary.language.generate(generation(Sampling(2), rows=65), 20):
                pass
    assert len(model.asked) == 2


async def test_a_constraint_is_refused_by_its_field() -> None:
    model = TensorRtLlm(RED)
    async with house(model) as served:
        with pytest.raises(InvalidRequest, match="the server of tiny cannot constrain answers: leave choices out") as e:
            await ask(served, question(guide=guide_of(("yes", "no"), None, None)))
    assert (e.value.param, e.value.code) == ("choices", "constraints_not_supported")
    assert model.asked == []
