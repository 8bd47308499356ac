"""One HTTP request opens one reservation, which gives back all that it held, once, however the request ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio

from service.admission.admission import Admission, Reservation, Size
from service.admission.quota import Cost
from service.admission.scheduler import Resource
from service.core.errors import Unavailable
from service.edges.caller import READING_S
from service.edges.http import answering
from tests.service.edges.http.test_vqa import ASKED, Caller, SlowReader
from tests.support.calls import question as grpc_question
from tests.support.calls import served
from tests.support.fakes import House, png, turns, until

BESIDE = Cost(nbytes=1000, pixels=2000, tokens=10)  # of another request, which goes on


class CountingAdmission(Admission):
    """Tells how many reservations were opened."""

    opened = 0
    size: Size | None = None  # of the last one

    @contextmanager
    def reservation(
        self, tenant: str, size: Size | None = None, within: Reservation | None = None
    ) -> Iterator[Reservation]:
        self.opened += 1
        self.size = size
        with super().reservation(tenant, size, within) as reservation:
            yield reservation


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(admission=CountingAdmission, body_timeout_s=0.2))
    caller.house.admission.quota.reserve(BESIDE, "acme", 0.0)
    yield caller
    await caller.close()


class Sent:
    """One request as a server hands it over: `chunks` of its body, then more when `more` is set."""

    def __init__(
        self, caller: Caller, path: str, *chunks: bytes, rest: bytes | None = None, length: int | None = None
    ) -> None:
        """Without `rest` the body ends with its chunks. `length` is declared before them."""
        self.gone, self.more = asyncio.Event(), asyncio.Event()
        self.stuck: Callable[[bytes], bool] = lambda _: False  # from these bytes on the caller takes nothing
        self.sent: list[bytes] = []
        self.status = 0
        self._rest = rest
        self._messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        if rest is None:
            self._messages[-1]["more_body"] = False
        headers = [(b"content-type", b"application/json"), (b"x-tenant-id", b"acme")]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        self.task = asyncio.create_task(caller.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, object]:
        if self._messages:
            return self._messages.pop(0)
        if self._rest is not None:
            waits = [asyncio.create_task(event.wait()) for event in (self.more, self.gone)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if self.more.is_set():
                rest, self._rest = self._rest, None
                return {"type": "http.request", "body": rest, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, object]) -> None:
        self.status = message.get("status", self.status)
        body = message.get("body", b"")
        self.sent.append(body)
        if self.stuck(body):
            await asyncio.Event().wait()

    async def end(self) -> None:
        await until(self.task.done)
        assert self.task.exception() is None


def question(**changes: object) -> bytes:
    return json.dumps(ASKED | changes).encode()


def holds(caller: Caller) -> Cost:
    """Besides the other request."""
    return caller.house.admission.quota.held.minus(BESIDE)


async def require_one_reservation(caller: Caller, sent: Sent, status: int) -> None:
    await sent.end()
    admission = caller.house.admission
    assert sent.status == status
    assert admission.opened == 1
    assert holds(caller) == Cost()
    assert not any(map(admission.scheduler.used, Resource))
    assert len(admission.contention) == 0
    assert caller.house.language.open == 0
    assert caller.house.counted("glimpse_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/vqa", question(), 200),
        ("/v1/vqa", question(stream=True), 200),
        ("/v1/vqa", b"{", 400),
        ("/v1/vqa", question(question=" "), 400),
        ("/v1/vqa", question(max_tokens=1000), 400),
        ("/v1/vqa", question(image="img_gone"), 404),
        ("/v1/vqa", question(image="img_gone", stream=True), 404),
        ("/v1/vqa", question(image="aGVsbG8="), 400),
        ("/v1/images", png(), 200),
        ("/v1/images", b"no image", 400),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
async def test_a_request_has_one_reservation(caller, path, body, status, declared):
    await require_one_reservation(caller, Sent(caller, path, body, length=len(body) if declared else None), status)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("fault", "status"), [(Unavailable("gone"), 503), (RuntimeError("secret"), 500)])
async def test_a_fault_before_the_first_token(caller, stream, fault, status):
    caller.house.vision.fault = fault
    await require_one_reservation(caller, Sent(caller, "/v1/vqa", question(stream=stream)), status)


async def test_a_fault_after_the_first_event(caller):
    caller.house.language.say(" red red")
    caller.house.language.wait_at = 1
    caller.house.language.fault = Unavailable("gone")
    sent = Sent(caller, "/v1/vqa", question(stream=True))
    await require_one_reservation(caller, sent, 200)
    assert b'"unavailable"' in sent.sent[-1]


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/images"])
@pytest.mark.parametrize("length", [None, 5000])
async def test_a_caller_that_leaves_while_it_sends(caller, path, length):
    sent = Sent(caller, path, b"{" * 1000, rest=b"}" * 4000, length=length)
    await until(lambda: holds(caller) == Cost(nbytes=1000))
    sent.gone.set()
    await require_one_reservation(caller, sent, 499)


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/images"])
async def test_a_caller_that_sends_too_slowly(caller, path):
    await require_one_reservation(caller, Sent(caller, path, b"{", rest=b"}"), 408)


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 499)])
async def test_a_caller_that_leaves_while_it_is_answered(caller, stream, status):
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 1
    caller.house.language.gate.clear()
    body = question(stream=stream)
    sent = Sent(caller, "/v1/vqa", body)
    await until(lambda: caller.house.language.open and (sent.sent or not stream))
    assert holds(caller) == Cost(len(body), 224 * 224, caller.house.admission.row_tokens)
    sent.gone.set()
    await require_one_reservation(caller, sent, status)


async def test_a_caller_that_leaves_before_the_first_event(caller):
    caller.house.vision.gate.clear()
    sent = Sent(caller, "/v1/vqa", question(stream=True))
    await until(lambda: caller.house.vision.calls)
    sent.gone.set()
    await sent.end()
    assert caller.house.admission.scheduler.used(Resource.VISION)  # an encode that was sent goes on
    caller.house.vision.gate.set()
    await until(lambda: not caller.house.admission.scheduler.used(Resource.VISION))
    await require_one_reservation(caller, sent, 499)


async def test_a_caller_that_leaves_while_its_image_is_decoded(caller):
    caller.house.pipeline.pixels.reader = SlowReader()
    sent = Sent(caller, "/v1/images", png())
    await until(lambda: holds(caller) == Cost(len(png()), 224 * 224))
    sent.gone.set()
    await require_one_reservation(caller, sent, 499)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("started", [True, False])
async def test_a_loop_that_stands_still_is_no_caller_that_has_gone(caller, stream, started):
    """The deadline, and the edge's timeout behind it, pass in the same turn of the loop."""
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 1 if started else 0
    caller.house.language.gate.clear()
    sent = Sent(caller, "/v1/vqa", question(stream=stream, timeout_s=0.05))
    await until(lambda: caller.house.language.open and (sent.sent or not (stream and started)))
    time.sleep(READING_S + 0.2)  # noqa: ASYNC251 - the stall
    await require_one_reservation(caller, sent, 200 if stream and started else 504)
    assert b'"deadline_exceeded"' in b"".join(sent.sent)
    assert (b"[DONE]" in sent.sent[-1]) == (stream and started)
    assert caller.house.outcomes() == {"short_deadline": 1}


async def test_the_end_of_the_service_is_told_to_each_request_that_still_runs(caller):
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 1
    caller.house.language.gate.clear()
    writing = [Sent(caller, "/v1/vqa", question(stream=True)) for _ in range(3)]
    whole = Sent(caller, "/v1/vqa", question())
    await until(lambda: caller.house.language.open == 4 and all(sent.sent for sent in writing))
    caller.house.vision.gate.clear()
    looking = Sent(caller, "/v1/vqa", question(stream=True, question="which shape?"))
    reading = Sent(caller, "/v1/images", png()[:100], rest=png()[100:])
    await until(lambda: caller.house.vision.calls[1:] and caller.house.admission.opened == 6)
    await turns()
    caller.house.admission.end()
    for sent in (*writing, whole, looking, reading):
        await sent.end()
        assert b'"shutting_down"' in b"".join(sent.sent)
    assert [sent.status for sent in (*writing, whole, looking, reading)] == [200, 200, 200, 503, 503, 503]
    assert all(b"[DONE]" in sent.sent[-1] for sent in writing)
    assert holds(caller) == Cost()
    assert caller.house.outcomes() == {"shutting_down": 5}


async def test_what_begins_to_wait_after_the_end_is_told_too(caller):
    caller.house.vision.gate.clear()
    sent = Sent(caller, "/v1/vqa", question()[:50], rest=question()[50:])
    await until(lambda: holds(caller).nbytes == 50)
    caller.house.admission.is_ending = True
    sent.more.set()
    await require_one_reservation(caller, sent, 503)


async def test_a_caller_that_does_not_read_why_its_stream_ends_is_not_waited_for(caller, monkeypatch):
    monkeypatch.setattr(answering, "TELLING_S", 0.05)
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 1
    caller.house.language.gate.clear()
    sent = Sent(caller, "/v1/vqa", question(stream=True))
    sent.stuck = lambda data: b"error" in data
    await until(lambda: sent.sent)
    caller.house.admission.end()
    await require_one_reservation(caller, sent, 200)
    assert b"error" in sent.sent[-1]


async def test_a_caller_that_does_not_read_the_end_holds_its_body_only(caller):
    body = question(stream=True)
    sent = Sent(caller, "/v1/vqa", body)
    sent.stuck = lambda data: b"[DONE]" in data
    await until(lambda: sent.sent and b"[DONE]" in sent.sent[-1])
    assert b'"usage"' in sent.sent[-1]  # the last event, in the same write
    assert holds(caller) == Cost(nbytes=len(body))
    assert not any(map(caller.house.admission.scheduler.used, Resource))
    sent.gone.set()
    await require_one_reservation(caller, sent, 200)


@pytest.mark.parametrize(("path", "body"), [("/v1/vqa", question()), ("/v1/images", png())])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_request_whose_body_was_let_in_before_a_stop_may_end(caller, path, body, declared):
    half = len(body) // 2
    sent = Sent(caller, path, body[:half], rest=body[half:], length=len(body) if declared else None)
    await until(lambda: holds(caller).nbytes >= half)
    caller.house.admission.stop()
    sent.more.set()
    await require_one_reservation(caller, sent, 200)
    late = Sent(caller, path, body)
    await late.end()
    assert late.status == 503
    assert b"shutting_down" in late.sent[-1]


async def test_a_body_of_unknown_length_that_has_not_begun_at_a_stop_may_end(caller):
    body = question()
    sent = Sent(caller, "/v1/vqa", b"", rest=body)
    await until(lambda: caller.house.admission.opened)
    caller.house.admission.stop()
    sent.more.set()
    await require_one_reservation(caller, sent, 200)


@pytest.mark.parametrize(
    ("length", "size"), [(None, Size.UNKNOWN), (len(question()), Size.SMALL), (len(question()) + 5000, Size.LARGE)]
)
async def test_a_reservation_has_the_size_that_the_door_saw(caller, length, size):
    body = question() if length is None else question().ljust(length)
    await Sent(caller, "/v1/vqa", body, length=length).task
    assert caller.house.admission.size is size


async def test_a_call_over_grpc_has_an_unknown_size():
    house = House(admission=CountingAdmission)
    async with served(house) as service:
        await service.stub.Answer(grpc_question())
    assert house.admission.size is Size.UNKNOWN
