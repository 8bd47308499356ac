"""A caller who leaves gives everything back at once, wherever its request is; one that expires costs nothing.

At once is counted in turns of the event loop: there is no timer on the way, and no wait for a model or a thread. An
encode that was sent to Triton goes on: it holds its slots until it ends, and its features are kept. So does a call that
attends, with the request's tokens. So does a decode that a worker has begun, with its slot, its pixels and the body.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterator

import pytest

from service.admission.quota import Cost
from service.admission.scheduler import Kind, Resource
from service.core.card import ModelCard
from service.edges.http.application import http_api
from service.media.decoder import Decoded
from service.media.reader import ImageReader
from tests.support.fakes import CARD, CLOSER, House, png, until

TURNS = 10  # each a fraction of a millisecond; it takes 3
WHOLE_LLM = {"max_tokens": 100}  # with the prompt more than half of max_positions: one request at a time


class CountingReader(ImageReader):
    """Begins to decode when `worker` is set, and ends when the gate is set."""

    asked = decoded = 0

    def __init__(self, reader: ImageReader) -> None:
        super().__init__(reader.limits, threads=1)
        self.worker, self.gate = asyncio.Event(), asyncio.Event()
        self.worker.set()
        self.gate.set()

    async def begin_decode(self, *args: object) -> asyncio.Future[Decoded]:
        self.asked += 1
        await self.worker.wait()
        self.decoded += 1
        return asyncio.create_task(self._ended(await super().begin_decode(*args)))

    async def _ended(self, work: asyncio.Future[Decoded]) -> Decoded:
        await self.gate.wait()
        return await work


class Service:
    """One vision slot, one row of the LLM."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.house = House(card, vision_slots=1, llm_tokens=CARD.max_positions)
        self.house.reader.close()
        self.reader = CountingReader(self.house.reader)
        self.house.reader = self.house.pipeline.reader = self.house.pipeline.pixels.reader = self.reader
        self.app = http_api(self.house.edge)

    def ask(self, number: int, **fields: object) -> Caller:
        body = {"image": b64encode(png((number, 0, 0))).decode(), "question": "?", **WHOLE_LLM, **fields}
        return Caller(self, json.dumps(body).encode())

    def waiting(self) -> int:
        return sum(self.house.admission.scheduler.waiting(kind) for kind in Kind)

    def go_on(self) -> None:
        for event in (self.reader.worker, self.reader.gate, self.house.vision.gate, self.house.language.gate):
            event.set()

    def holds_nothing(self) -> bool:
        admission = self.house.admission
        return admission.quota.held == Cost() and not any(map(admission.scheduler.used, Resource))


class Caller:
    """A question as a server hands it over, and the way to hang up."""

    def __init__(self, service: Service, body: bytes) -> None:
        self.gone = asyncio.Event()
        self.messages = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/vqa", "query_string": b"", "headers": headers}
        self.task = asyncio.create_task(service.app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, object]:
        if self.messages:
            return self.messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, object]) -> None:
        pass

    async def leave(self) -> int:
        """In how many turns of the loop nothing was left of it."""
        self.gone.set()
        for turn in range(1, TURNS + 1):
            await asyncio.sleep(0)
            if self.task.done():
                return turn
        pytest.fail(f"still there after {TURNS} turns")


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.reader.close()


async def waiting_for_a_worker(service: Service) -> Caller:
    service.reader.worker.clear()
    caller = service.ask(1)
    await until(lambda: service.reader.asked)
    return caller


async def decoding(service: Service) -> Caller:
    service.reader.gate.clear()
    caller = service.ask(1)
    await until(lambda: service.reader.decoded)
    return caller


async def encoding(service: Service) -> Caller:
    service.house.vision.close("see")
    caller = service.ask(1)
    await until(lambda: "see" in service.house.vision.calls)
    return caller


async def encoding_closer(service: Service) -> Caller:
    service.house.vision.close("encode")
    caller = service.ask(1, detail="high")
    await until(lambda: "encode 1" in service.house.vision.calls)
    return caller


async def attending(service: Service) -> Caller:
    await service.ask(1).task
    service.house.vision.close("attend")
    caller = service.ask(1)
    await until(lambda: "attend" in service.house.vision.calls)
    return caller


async def prefilling(service: Service) -> Caller:
    service.house.language.gate.clear()
    caller = service.ask(1)
    await until(lambda: service.house.language.open)
    return caller


async def writing(service: Service) -> Caller:
    service.house.language.say(" red red red")
    service.house.language.wait_at = 1
    service.house.language.gate.clear()
    caller = service.ask(1, stream=True)
    await until(lambda: service.house.language.open)
    return caller


IN_THE_HOUSE = (waiting_for_a_worker, decoding, encoding, attending, prefilling, writing)
GOES_ON = (decoding, encoding, attending)


@pytest.mark.parametrize("station", IN_THE_HOUSE)
async def test_who_leaves_gives_everything_back_and_the_next_one_has_it(service, station):
    """At once, or when a worker or Triton has ended what was begun."""
    caller = await station(service)
    following = service.ask(2)
    await until(lambda: service.waiting() == 1)
    await caller.leave()
    assert service.waiting() == (1 if station in GOES_ON else 0)
    service.go_on()
    await following.task
    assert service.house.outcomes()["cancelled"] == 1
    assert service.house.language.open == 0
    assert service.holds_nothing()


@pytest.mark.parametrize(
    ("station", "resource"),
    [
        (waiting_for_a_worker, Resource.VISION),
        (decoding, Resource.VISION),
        (attending, Resource.LLM),
        (prefilling, Resource.LLM),
        (writing, Resource.LLM),
    ],
)
async def test_who_leaves_before_its_work_is_done_tells_nothing_of_how_long_it_takes(service, station, resource):
    """Claims that cannot end in time are refused by the shortest time that one was held for a whole answer."""
    caller = await station(service)
    pool = service.house.admission.scheduler._pools[resource]
    pool.least_s = 5.0
    await caller.leave()
    service.go_on()
    await until(service.holds_nothing)
    assert pool.least_s == 5.0


async def test_who_leaves_while_a_worker_decodes_holds_the_slot_the_pixels_and_the_body_until_it_ends(service):
    caller = await decoding(service)
    before = service.house.admission.quota.held
    assert before.pixels > 0
    await caller.leave()
    assert service.house.admission.quota.held == before._replace(tokens=0)
    assert service.house.admission.scheduler.used(Resource.VISION) == 1
    service.go_on()
    await until(service.holds_nothing)
    assert service.house.vision.calls == []


async def test_who_leaves_while_it_waits_for_a_worker_is_not_decoded(service):
    await (await waiting_for_a_worker(service)).leave()
    assert service.holds_nothing()
    service.go_on()
    await asyncio.sleep(0)
    assert service.reader.decoded == 0


async def test_who_leaves_while_its_closer_view_is_encoded_gives_its_slots_back():
    service = Service(CLOSER)
    await (await encoding_closer(service)).leave()
    held = service.house.admission.quota.held
    assert held == Cost(nbytes=held.nbytes)
    assert not service.holds_nothing()  # the encode has slots
    service.house.vision.gate.set()
    await until(service.holds_nothing)
    service.reader.close()


@pytest.mark.parametrize("station", [encoding, prefilling])
async def test_who_leaves_the_queue_for_the_vision_stage_or_the_llm_is_in_it_no_more(service, station):
    first = await station(service)
    second = service.ask(2)
    await until(lambda: service.waiting() == 1)
    seen, decoded = len(service.house.vision.calls), service.reader.decoded
    await second.leave()
    assert service.waiting() == 0
    await first.leave()
    service.house.vision.gate.set()
    await until(service.holds_nothing)
    assert (len(service.house.vision.calls), service.reader.decoded) == (seen, decoded)
    assert service.house.counted("glimpse_tokens_saved_total", reason="cancelled") == 200


async def test_who_leaves_while_another_encodes_its_image_leaves_the_other_alone(service):
    first = await encoding(service)
    second = service.ask(1)
    await until(lambda: service.house.counted("glimpse_requests_in_flight") == 2)
    await second.leave()
    assert not first.task.done()
    service.house.vision.gate.set()
    await first.task
    assert service.house.outcomes() == {"cancelled": 1, "ok": 1}
    assert service.holds_nothing()


@pytest.mark.parametrize("station", [encoding, prefilling])
async def test_who_expires_in_a_queue_was_neither_decoded_nor_seen_nor_answered(service, station):
    first = await station(service)
    await service.ask(2, timeout_s=0.05).task
    assert list(service.house.outcomes()) == ["short_deadline"]
    if station is encoding:
        assert (service.reader.decoded, service.house.vision.calls) == (1, ["see"])
    else:
        assert len(service.house.language.prompts) == 1
    await first.leave()
    service.house.vision.gate.set()
    await until(service.holds_nothing)


async def test_a_follow_up_that_expires_in_the_llms_queue_was_not_attended_to(service):
    await service.ask(2).task
    first = await prefilling(service)
    calls = list(service.house.vision.calls)
    await service.ask(2, timeout_s=0.05).task
    assert service.house.vision.calls == calls
    assert len(service.house.language.prompts) == 2  # the one before, and the one that runs
    await first.leave()
    assert service.holds_nothing()
