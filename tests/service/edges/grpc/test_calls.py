"""Calls of a service without Triton, by the generated stub over a real connection."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from structlog.testing import capture_logs

from service.admission.admission import UNHURRIED
from service.admission.quota import Cost
from service.admission.scheduler import Resource
from service.core.errors import Overloaded, Unavailable
from service.edges.grpc import calls
from service.edges.grpc.stubs import vqa_pb2 as pb
from tests.support import films
from tests.support.calls import Service, chunks, failure, part_of, question, served, streamed
from tests.support.fakes import SPELLED, House, png, until

TEN_MINUTES_S = 600
NARROW = (("grpc.http2.lookahead_bytes", 8), ("grpc.http2.bdp_probe", 0))  # a client that buffers a few bytes


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    async with served(House(max_image_bytes=100_000, max_image_pixels=1_000_000)) as service:
        yield service


def holds_nothing(house: House) -> bool:
    return house.admission.quota.held == Cost() and not any(map(house.admission.scheduler.used, Resource))


async def silent() -> AsyncIterator[pb.PutImageRequest]:
    """Sends nothing, and does not end."""
    await asyncio.Event().wait()
    yield pb.PutImageRequest()


async def test_an_answer_has_everything_that_is_known_of_it(service):
    answer = await service.stub.Answer(question())
    assert answer.id.startswith("vqa_")
    assert answer.image_ids[0].startswith("img_")
    assert answer.timing_ms.total > 0
    assert (answer.model, answer.answer, answer.finish_reason) == ("tiny", "red", pb.FINISH_REASON_STOP)
    assert answer.vision == pb.Vision(
        cache=pb.CACHE_MISS, vision_tokens=64, visual_tokens=32, detail=pb.DETAIL_LOW, fit=pb.FIT_SQUASH
    )
    assert answer.usage.image_tokens == 32
    assert not answer.relevance
    explained = await service.stub.Answer(question(answer.image_ids[0], "which shape?", explain=True))
    assert explained.vision.cache == pb.CACHE_HIT
    assert list(explained.relevance[0].map) == [0.5] * 256


async def test_log_probs_are_told_at_the_end(service):
    asked = question(logprobs=True, top_logprobs=2)
    service.house.language.say(" red")
    whole = await service.stub.Answer(asked)
    _, end = await streamed(service.stub.StreamAnswer(asked))
    assert b"".join(told.token for told in whole.logprobs) == b" red"
    assert [told.logprob for told in whole.logprobs] == [-place / 2 for place in range(len(whole.logprobs))]
    tops = [[(top.token, top.logprob) for top in told.top_logprobs] for told in whole.logprobs]
    assert tops == [[(spelled, -place / 4) for spelled in SPELLED[3:5]] for place in range(len(tops))]
    assert list(end.logprobs) == list(whole.logprobs)
    assert not (await service.stub.Answer(question())).logprobs


async def test_a_stream_is_deltas_and_then_the_rest(service):
    service.house.language.say(" a red ring")
    text, end = await streamed(service.stub.StreamAnswer(question(explain=True)))
    assert (text, end.answer, end.finish_reason) == ("a red ring", "", pb.FINISH_REASON_STOP)
    assert len(end.relevance) == 1
    assert service.house.language.sampling[0].streaming


async def test_a_video_is_kept_in_chunks_and_asked_about_by_its_id(service):
    film = films.video()
    kept = await service.stub.PutImage(chunks(film, size=100))
    assert (kept.bytes, kept.width, kept.height) == (len(film), films.SIDE, films.SIDE)
    asked = pb.AnswerRequest(parts=[pb.Part(video_id=kept.id), pb.Part(text="what?")], video_frames=2)
    for cache in (pb.CACHE_MISS, pb.CACHE_HIT):
        said = await service.stub.Answer(asked)
        assert (said.video_id, list(said.image_ids), said.vision.cache) == (kept.id, [], cache)
        assert [frame.index for frame in said.vision.frames] == [0, 9]


async def test_an_image_is_sent_once_in_chunks_and_asked_about_by_its_id(service):
    kept = await service.stub.PutImage(chunks(png(), size=100))
    assert (kept.bytes, kept.width, kept.height) == (len(png()), 224, 224)
    assert kept.expires_at.ToSeconds() == pytest.approx(time.time() + service.house.settings.image_ttl_s, abs=60)
    answer = await service.stub.Answer(question(kept.id, "what colour?"))
    assert list(answer.image_ids) == [kept.id]


async def test_the_callers_id_comes_back_and_its_tenant_holds_the_reservation(service):
    service.house.language.gate.clear()
    call = service.stub.Answer(question(), metadata=(("x-request-id", "mine"), ("x-tenant-id", "acme")))
    await until(lambda: service.house.language.open)
    assert list(service.house.admission.quota._tenants) == ["acme"]
    service.house.language.gate.set()
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
    unnamed = service.stub.Answer(question(), metadata=(("x-request-id", "with a space"),))
    await unnamed
    assert len(dict(await unnamed.trailing_metadata())["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("asked", "metadata", "status", "reason", "field"),
    [
        (question("what colour?"), (), "INVALID_ARGUMENT", "missing_field", "parts"),
        (question(png()), (), "INVALID_ARGUMENT", "invalid_request", "parts"),
        (
            question(png(), "?", turns=[pb.Turn(parts=[pb.Part(text=" ")], answer="a")]),
            (),
            *("INVALID_ARGUMENT", "invalid_request", "turns.0.parts"),
        ),
        (
            question("img_unknown", "?", turns=[pb.Turn(parts=[pb.Part(text="?"), part_of(png())], answer="a")]),
            (),
            *("NOT_FOUND", "image_not_found", "parts.0.image_id"),
        ),
        (
            question("?", turns=[pb.Turn(parts=[pb.Part(text="?"), part_of(b"no image")], answer="a")]),
            (),
            *("INVALID_ARGUMENT", "invalid_image", "turns.0.parts.1.image"),
        ),
        (
            pb.AnswerRequest(parts=[pb.Part(text="?"), pb.Part(video=b"no video")]),
            (),
            *("INVALID_ARGUMENT", "invalid_image", "parts.1.video"),
        ),
        (
            pb.AnswerRequest(
                parts=[pb.Part(frames=pb.Frames(frames=[pb.Frame(image=png()), pb.Frame(image=b"no")])), part_of("?")]
            ),
            (),
            *("INVALID_ARGUMENT", "invalid_image", "parts.0.frames.frames.1"),
        ),
        (question(temperature=9.0), (), "INVALID_ARGUMENT", "invalid_request", "temperature"),
        (question(b"no image", "?"), (), "INVALID_ARGUMENT", "invalid_image", "parts.0.image"),
        (question(png(), b"no image", "?"), (), "INVALID_ARGUMENT", "invalid_image", "parts.1.image"),
        (question(png(size=(2000, 2000)), "?"), (), "INVALID_ARGUMENT", "too_large", "parts.0.image"),
        (question(bytes(100_001), "?"), (), "INVALID_ARGUMENT", "too_large", "parts.0.image"),
        (question(max_tokens=190), (), "INVALID_ARGUMENT", "context_length_exceeded", "max_tokens"),
        (question(detail=pb.DETAIL_HIGH), (), "INVALID_ARGUMENT", "detail_not_supported", "detail"),
        (question("img_unknown", "?"), (), "NOT_FOUND", "image_not_found", "parts.0.image_id"),
        (question(), (("x-tenant-id", "a b"),), "INVALID_ARGUMENT", "invalid_tenant", "x-tenant-id"),
        (
            pb.AnswerRequest(parts=[pb.Part(image_url="https://x/y.png"), pb.Part(text="?")]),
            (),
            *("INVALID_ARGUMENT", "url_not_supported", "parts.0.image_url"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_wrong_question_is_told_by_status_code_and_field(service, asked, metadata, status, reason, field):
    for call in (
        service.stub.Answer(asked, metadata=metadata),
        service.stub.StreamAnswer(asked, metadata=metadata).read(),
    ):
        failed = await failure(call)
        assert (failed.code, failed.reason, failed.field) == (status, reason, field)
        assert failed.message == failed.status.message
        assert failed.retry_after_s is None
    assert service.counted() == {("Answer", status): 1, ("StreamAnswer", status): 1}
    assert holds_nothing(service.house)


@pytest.mark.parametrize(
    ("fault", "status", "reason", "retry_after_s"),
    [
        (Unavailable("a model does not answer"), "UNAVAILABLE", "unavailable", None),
        (Overloaded("full", retry_after_s=2.5), "RESOURCE_EXHAUSTED", "overloaded", 2.5),
        (ZeroDivisionError("inner"), "INTERNAL", "internal_error", None),
    ],
)
async def test_a_fault_behind_the_edge_is_told_without_inner_text(service, fault, status, reason, retry_after_s):
    service.house.vision.fault = fault
    with capture_logs():
        failed = await failure(service.stub.Answer(question(), metadata=(("x-request-id", "mine"),)))
    assert (failed.code, failed.reason, failed.retry_after_s) == (status, reason, retry_after_s)
    assert failed.details[error_details_pb2.RequestInfo].request_id == failed.trailing["x-request-id"] == "mine"
    assert "inner" not in failed.message


async def test_a_fault_of_the_edge_itself_is_logged_once_and_told_without_inner_text(service, monkeypatch):
    monkeypatch.setattr(service.house.pipeline, "answer", lambda *_: 1 / 0)
    with capture_logs() as logs:
        failed = await failure(service.stub.Answer(question()))
    assert (failed.code, failed.reason) == ("INTERNAL", "internal_error")
    assert [(line["event"], line["method"]) for line in logs] == [("fault", "Answer")]
    assert "division" not in failed.message


async def test_a_full_service_refuses_before_it_reads():
    async with served(House(max_requests_in_flight=1)) as service:
        service.house.language.gate.clear()
        first = service.stub.Answer(question())
        await until(lambda: service.house.language.open)
        failed = await failure(service.stub.PutImage(silent()))
        assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "saturated")
        assert failed.retry_after_s >= 1
        service.house.language.gate.set()
        await first
        assert holds_nothing(service.house)


async def test_the_bytes_of_messages_and_of_chunks_are_reserved():
    async with served(House()) as service:
        service.house.language.gate.clear()
        asked = question(png(size=(300, 300)), "?")
        call = service.stub.Answer(asked)
        await until(lambda: service.house.language.open)
        assert service.house.admission.quota.held.nbytes == asked.ByteSize()
        sending = asyncio.Event()

        async def half() -> AsyncIterator[pb.PutImageRequest]:
            yield pb.PutImageRequest(data=bytes(1000))
            await sending.wait()

        upload = service.stub.PutImage(half())
        await until(lambda: service.house.admission.quota.held.nbytes == asked.ByteSize() + 1000)
        sending.set()
        assert (await failure(upload)).reason == "invalid_image"
        service.house.language.gate.set()
        await call
        assert holds_nothing(service.house)


async def test_a_message_that_takes_long_reserves_what_the_largest_needs(service):
    """gRPC tells its size only when it is whole."""
    house = service.house
    most = house.settings.max_body_bytes
    room = house.settings.max_upload_bytes_in_flight // most
    calls = [service.stub.PutImage(silent()) for _ in range(room)]
    await until(lambda: house.admission.quota.held.nbytes == room * most)
    failed = await failure(service.stub.PutImage(silent()))
    assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "saturated")
    assert (await service.stub.Answer(question())).answer == "red"  # small ones keep their room
    for call in calls:
        call.cancel()
    await until(lambda: holds_nothing(house))


async def test_a_message_that_does_not_come_is_not_awaited_for_ever():
    async with served(House(body_timeout_s=0.05)) as service:
        failed = await failure(service.stub.PutImage(silent()))
        assert (failed.code, failed.reason) == ("DEADLINE_EXCEEDED", "slow_body")
        assert holds_nothing(service.house)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(bytes(100_001), "too_large"), (b"", "invalid_image"), (b"GIF8 but not whole", "invalid_image")],
)
async def test_an_upload_that_is_no_image_or_too_large_is_refused(service, data, reason):
    failed = await failure(service.stub.PutImage(chunks(data, size=1000)))
    assert (failed.code, failed.reason, failed.field) == ("INVALID_ARGUMENT", reason, "data")


async def test_a_message_over_the_limit_is_refused_by_its_size(service):
    large = question(bytes(service.house.settings.max_body_bytes + 1), "?")
    failed = await failure(service.stub.Answer(large))
    assert (failed.code, failed.status) == ("RESOURCE_EXHAUSTED", None)  # by gRPC itself
    packed = service.stub.Answer(
        question(bytes(10 * len(large.SerializeToString()))), compression=grpc.Compression.Gzip
    )
    assert (await failure(packed)).code == "RESOURCE_EXHAUSTED"


async def test_what_is_no_message_is_refused(service):
    garbled = service.channel.unary_unary("/glimpse.v1.VisualQuestionAnswering/Answer")
    failed = await failure(garbled(b"\x0a\xff"))
    assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "invalid_message")
    empty = service.channel.stream_unary("/glimpse.v1.VisualQuestionAnswering/Answer")
    assert (await failure(empty(iter(())))).reason == "invalid_request"
    unknown = service.channel.unary_unary("/glimpse.v1.VisualQuestionAnswering/Guess")
    assert (await failure(unknown(b""))).code == "UNIMPLEMENTED"


async def test_the_deadline_is_the_requests_timeout_and_is_told_with_details(service, monkeypatch):
    """A second before the caller's own deadline: on a busy machine the error takes longer than ANSWERING_S."""
    monkeypatch.setattr(calls, "ANSWERING_S", 1.0)
    monkeypatch.setattr(calls, "ANSWERING_SHARE", 1.0)
    service.house.language.gate.clear()
    failed = await failure(service.stub.Answer(question(), timeout=1.5))
    assert (failed.code, failed.reason) == ("DEADLINE_EXCEEDED", "deadline_exceeded")
    # half a second, by gRPC's clocks, which differ by some milliseconds; without a deadline it would be 30 s
    assert 0 < float(re.search(r"timeout_s=([\d.]+): ", failed.message)[1]) < 1
    assert holds_nothing(service.house)
    assert service.house.outcomes() == {"short_deadline": 1}


async def test_a_deadline_beyond_the_limit_is_cut_and_none_is_the_default():
    async with served(House(default_timeout_s=0.1, max_timeout_s=0.2)) as service:
        service.house.language.gate.clear()
        for timeout_s, said in ((TEN_MINUTES_S, "timeout_s=0.2"), (None, "timeout_s=0.1")):
            failed = await failure(service.stub.Answer(question(), timeout=timeout_s))
            assert failed.reason == "deadline_exceeded"
            assert said in failed.message


async def encoding(service: Service) -> grpc.aio.Call:
    service.house.vision.close("see")
    call = service.stub.Answer(question())
    await until(lambda: service.house.vision.calls)
    return call


async def writing(service: Service) -> grpc.aio.Call:
    service.house.language.say(" red red red")
    service.house.language.wait_at = 1
    service.house.language.gate.clear()
    call = service.stub.StreamAnswer(question())
    assert (await call.read()).delta == "red"
    return call


async def sending(service: Service) -> grpc.aio.Call:
    async def half() -> AsyncIterator[pb.PutImageRequest]:
        yield pb.PutImageRequest(data=bytes(1000))
        await asyncio.Event().wait()

    call = service.stub.PutImage(half())
    await until(lambda: service.house.admission.quota.held.nbytes == 1000)
    return call


@pytest.mark.parametrize("station", [encoding, writing, sending])
async def test_a_caller_that_cancels_gives_everything_back(service, station):
    call = await station(service)
    call.cancel()
    await until(service.counted)
    assert [status for _, status in service.counted()] == ["CANCELLED"]
    assert service.house.language.open == 0
    service.house.vision.gate.set()  # an encode that was sent goes on
    await until(lambda: holds_nothing(service.house))
    if station is not sending:
        assert service.house.outcomes() == {"cancelled": 1}


async def test_a_caller_that_does_not_read_is_given_up():
    async with served(House(default_timeout_s=0.1), options=NARROW) as service:
        service.house.language.say(" red" * 100)
        call = service.stub.StreamAnswer(question(max_tokens=120))
        await until(service.counted)
        assert service.counted() == {("StreamAnswer", "DEADLINE_EXCEEDED"): 1}
        assert holds_nothing(service.house)
        call.cancel()


async def test_a_service_whose_loop_is_late_refuses_before_it_reads():
    house = House()
    house.rpc = replace(house.rpc, lag_s=lambda: 60.0)
    async with served(house) as service:
        uploads = [service.stub.PutImage(silent()) for _ in range(UNHURRIED + 1)]
        failures = [asyncio.create_task(failure(upload)) for upload in uploads]
        (refused,), _ = await asyncio.wait(failures, return_when=asyncio.FIRST_COMPLETED)  # whichever came last
        assert (refused.result().code, refused.result().reason) == ("RESOURCE_EXHAUSTED", "saturated")
        for upload in uploads:
            upload.cancel()
        await asyncio.gather(*failures, return_exceptions=True)


async def test_a_caller_whose_connection_breaks_is_gone(service):
    await writing(service)
    await service.channel.close()
    await until(service.counted)
    assert (service.counted(), service.house.outcomes()) == ({("StreamAnswer", "CANCELLED"): 1}, {"cancelled": 1})
    assert holds_nothing(service.house)


async def test_while_it_stops_new_calls_are_sent_to_another_server(service):
    call = await writing(service)
    service.house.admission.stop()
    failed = await failure(service.stub.Answer(question()))
    assert (failed.code, failed.reason) == ("UNAVAILABLE", "shutting_down")
    assert failed.retry_after_s == 1
    service.stopped.set()
    service.house.language.gate.set()
    text, end = await streamed(call)
    assert (text, end.finish_reason) == (" red red", pb.FINISH_REASON_STOP)  # it had the grace to finish
    await service.run


async def test_streams_that_outlive_the_grace_are_told():
    async with served(House()) as service:
        upload, call = await sending(service), await writing(service)
        service.stopped.set()
        service.house.admission.end()  # as the process does after the grace
        assert (await failure(upload)).reason == "shutting_down"
        failed = await failure(call.read())
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "shutting_down")
        await service.run
        assert holds_nothing(service.house)
