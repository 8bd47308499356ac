"""The call Batch, by the generated stub over a real connection to a service without Triton."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from service.admission.quota import Cost
from service.core.errors import InvalidRequest
from service.edges.grpc import calls
from service.edges.grpc.messages import batch_question_in
from service.edges.grpc.stubs import vqa_pb2 as pb
from tests.support.calls import Service, failure, question, served
from tests.support.fakes import House, png, until

INVALID, NOT_FOUND = 3, 5  # google.rpc.Code


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    async with served(House(max_image_bytes=100_000, max_batch_questions=20)) as service:
        yield service


async def results_of(call: grpc.aio.StreamStreamCall) -> dict[int, pb.BatchResponse]:
    results = {}
    while (result := await call.read()) is not grpc.aio.EOF:
        assert result.index not in results
        results[result.index] = result
    return results


def batch(*questions: pb.AnswerRequest) -> list[pb.BatchRequest]:
    return [pb.BatchRequest(index=number, question=each) for number, each in enumerate(questions)]


async def test_every_question_is_answered_by_its_index_and_images_are_shared(service):
    asked = batch(*[question(png(), f"question {number}?", explain=number == 3) for number in range(10)])
    results = await results_of(service.stub.Batch(iter(asked)))
    assert sorted(results) == list(range(10))
    assert {result.answer.answer for result in results.values()} == {"red"}
    assert [len(results[number].answer.relevance) for number in (2, 3)] == [0, 1]
    assert service.house.vision.calls.count("see") == 1
    assert service.counted()["Batch", "OK"] == 1
    assert service.house.admission.quota.held == Cost()


async def test_a_question_that_fails_leaves_the_others_alone(service):
    asked = batch(
        question(),
        question("img_" + 32 * "0", "what?"),
        question(max_tokens=-1),
        question(),
        question(),
        pb.AnswerRequest(),
    )
    asked[3].timeout_s = math.nan
    asked[4].question.MergeFromString(b"\xf8\x07\x01")
    results = await results_of(service.stub.Batch(iter(asked)))
    assert results[0].answer.answer == "red"
    faults = [(results[number].error.status, results[number].error.code) for number in range(1, 6)]
    assert faults == [
        (NOT_FOUND, "image_not_found"),
        (INVALID, "invalid_request"),
        (INVALID, "invalid_request"),
        (INVALID, "unknown_field"),
        (INVALID, "missing_field"),
    ]
    assert (results[2].error.param, results[2].error.type) == ("max_tokens", "invalid_request_error")


async def test_results_come_while_questions_are_still_sent(service):
    call = service.stub.Batch()
    for number in (7, 8):
        await call.write(pb.BatchRequest(index=number, question=question()))
        assert (await call.read()).index == number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_caller_may_pause_between_its_questions_for_longer_than_a_body_may_take(monkeypatch):
    monkeypatch.setattr(calls, "PROMPT_S", 0.01)
    async with served(House(body_timeout_s=0.05)) as service:
        house = service.house
        house.language.gate.clear()
        call = service.stub.Batch()
        await call.write(pb.BatchRequest(index=0, question=question()))
        await until(lambda: house.language.open)
        held = house.admission.quota.held
        await asyncio.sleep(0.2)
        assert house.admission.quota.held == held
        house.language.gate.set()
        assert (await call.read()).answer.answer == "red"
        await call.write(pb.BatchRequest(index=1, question=question()))
        assert (await call.read()).answer.answer == "red"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_many_pauses_at_once_reserve_what_the_largest_message_needs(service, monkeypatch):
    monkeypatch.setattr(calls, "PROMPT_S", 0.001)
    monkeypatch.setattr(calls, "MAX_PAUSES", 2)
    quota = service.house.admission.quota
    paused = []
    for pauses in range(1, 5):
        paused.append(service.stub.Batch())
        await paused[-1].write(pb.BatchRequest(index=0, question=question()))
        assert (await paused[-1].read()).answer.answer == "red"
        beyond = max(0, pauses - 2) * service.house.settings.max_body_bytes
        await until(lambda beyond=beyond: quota.held.nbytes == beyond)
    for call in paused:
        call.cancel()
    await until(lambda: quota.held == Cost())


async def test_a_pause_lasts_no_longer_than_the_batch():
    async with served(House(batch_timeout_s=0.05)) as service:
        failed = await failure(service.stub.Batch().read())
        assert (failed.code, failed.reason) == ("DEADLINE_EXCEEDED", "deadline_exceeded")


async def test_a_batch_reads_no_further_than_it_answers(service):
    service.house.language.gate.clear()
    most = service.house.pipeline.batch_turns
    call = service.stub.Batch(iter(batch(*[question()] * 20)))
    await until(lambda: service.house.language.open == most)
    call.cancel()
    await until(lambda: not service.house.language.open and service.house.admission.quota.held == Cost())
    assert len(service.house.language.request_ids) == most
    await until(lambda: service.counted().get(("Batch", "CANCELLED")))


async def test_a_batch_goes_on_after_the_service_was_told_to_stop(service):
    call = service.stub.Batch()
    await call.write(pb.BatchRequest(index=0, question=question()))
    assert (await call.read()).answer.answer == "red"
    service.house.admission.stop()
    await call.write(pb.BatchRequest(index=1, question=question()))
    assert (await call.read()).answer.answer == "red"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert service.house.admission.quota.held == Cost()


async def test_a_message_stays_reserved_while_triton_works_on_it_though_its_call_has_ended(service):
    service.house.vision.close("see")
    call, quota = service.stub.Batch(), service.house.admission.quota
    message = pb.BatchRequest(index=0, question=question(png().ljust(5000, b"-"), "what?"))
    await call.write(message)
    await until(lambda: service.house.vision.calls)
    call.cancel()
    await until(lambda: quota.held.tokens == 0)
    assert quota.held.nbytes == message.ByteSize()
    service.house.vision.gate.set()
    await until(lambda: quota.held == Cost())


async def test_the_calls_deadline_ends_its_work(service):
    service.house.language.gate.clear()
    call = service.stub.Batch(iter(batch(question(), question())), timeout=1)
    await until(lambda: service.house.language.open == 2)
    await until(lambda: not service.house.language.open and service.house.admission.quota.held == Cost())
    call.cancel()


async def test_what_is_left_when_the_time_is_over_is_told_for_each_question():
    async with served(House(batch_timeout_s=0.05)) as service:
        service.house.language.gate.clear()
        results = await results_of(service.stub.Batch(iter(batch(*[question()] * 10))))
        assert [results[number].error.code for number in range(10)] == ["deadline_exceeded"] * 10


async def test_too_many_questions_are_refused(service):
    service.house.language.gate.set()
    failed = await failure(results_of(service.stub.Batch(iter(batch(*[question()] * 21)))))
    assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "too_large")
    assert "more than 20 questions" in failed.message


async def test_no_questions_are_no_results(service):
    assert await results_of(service.stub.Batch(iter([]))) == {}


@pytest.mark.parametrize("index", [0, 1, 127, 128, 2**32 - 1])
@pytest.mark.parametrize("timeout_s", [None, 0.0, 1.5])
def test_a_message_is_read_without_parsing_its_question(index, timeout_s):
    message = pb.BatchRequest(index=index, question=question(), timeout_s=timeout_s)
    read = batch_question_in(message.SerializeToString())
    assert (read.index, read.data, read.timeout_s) == (index, question().SerializeToString(), timeout_s)


@pytest.mark.parametrize("data", [b"\xf8\x07\x01", b"\x12\x01\x08\x12\x01\x08", b"\x19\x00", b"\x0b\x0c"])
def test_a_message_that_is_none_has_a_fault_and_its_index(data):
    read = batch_question_in(pb.BatchRequest(index=7).SerializeToString() + data)
    assert (read.index, read.data, type(read.fault)) == (7, b"", InvalidRequest)


async def test_a_message_that_is_none_leaves_the_others_alone(service):
    asked = [each.SerializeToString() for each in batch(question(), question(), question())]
    asked[1] += b"\xf8\x07\x01"
    raw = service.channel.stream_stream(
        "/glimpse.v1.VisualQuestionAnswering/Batch", response_deserializer=pb.BatchResponse.FromString
    )
    results = await results_of(raw(iter(asked)))
    assert [results[number].answer.answer for number in (0, 2)] == ["red", "red"]
    assert (results[1].error.status, results[1].error.code) == (INVALID, "unknown_field")
    assert service.counted() == {("Batch", "OK"): 1}
    assert service.house.admission.quota.held == Cost()
