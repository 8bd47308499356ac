"""What requests hold once they are answered, and while a batch waits: bytes, with Python's garbage collector off."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import grpc
import pytest

from benchmarks.bench.load import form
from service.admission.quota import Refusal
from service.admission.scheduler import Resource
from service.core.errors import Unavailable
from service.edges.batching import Batch
from service.edges.caller import Caller
from service.edges.grpc.calls import Calls
from service.edges.grpc.server import VisualQuestionAnswering
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.http.application import http_api
from service.media.reader import WorkerReader
from tests.support import fakes
from tests.support.clips import film
from tests.support.fakes import House, cancelled, png, until

pytestmark = pytest.mark.slow  # together: tests start decoding processes

SIZE = 1_000_000  # bytes of an image
STORED = 3 * SIZE  # bytes of images that the store may hold
TIMES = 10


def good(number: int) -> bytes:
    return png((number % 255, 2, 3)) + os.urandom(SIZE)


def bad(number: int) -> bytes:
    return png((1, 2, 3))[:60] + os.urandom(SIZE)


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(fakes, "ImageReader", lambda limits, threads: WorkerReader(limits, threads, 5.0))
    found = House(image_store_bytes=STORED, max_image_bytes=2 * SIZE)
    found.api = http_api(found.edge)
    yield found
    found.reader.close()


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def overload(house: House) -> None:
    house.admission.scheduler.refusal = lambda claim, now: Refusal("deadline", "no room", 1.0)


def fail(house: House) -> None:
    async def see(*_: object) -> None:
        await asyncio.sleep(0)
        raise Unavailable("the vision models do not answer")

    house.vision.see = see


def fault(house: House) -> None:
    house.vision.fault = Unavailable("the vision models do not answer")


def nothing(_: House) -> None: ...


class Context:
    """One gRPC call with the messages that `next_message` gives."""

    def __init__(self, next_message: Callable[[], Awaitable[bytes | None]]) -> None:
        self._next = next_message
        self.written = 0

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, _: object) -> None: ...

    def time_remaining(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    async def read(self) -> object:
        data = await self._next()
        return grpc.aio.EOF if data is None else data

    async def abort(self, *_: object) -> None:
        raise grpc.aio.AbortError("aborted")

    async def write(self, _: object) -> None:
        self.written += 1


Ask = Callable[[House, int], Awaitable[None]]


async def post(
    house: House, path: str, body: bytes, content_type: str, left_at: asyncio.Event | None = None
) -> tuple[int, list[dict[str, object]]]:
    """Ask the application itself, as a client would hold its own bodies -> the status, and what was sent.

    left_at: when the caller goes away. The status is 0 if nothing was sent.
    """
    sent: list[dict[str, object]] = []
    left = [body]
    headers = [(b"host", b"localhost"), (b"content-type", content_type.encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
             "headers": [*headers, (b"content-length", str(len(body)).encode())],
             "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {}}  # fmt: skip
    del body

    async def receive() -> dict[str, object]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        await (left_at or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await house.api(scope, receive, send)
    return sent[0]["status"] if sent else 0, sent


def posted(status: int, *images: Callable[[int], bytes], **fields: object) -> Ask:
    """A question in JSON."""

    async def ask(house: House, number: int) -> None:
        encoded = [base64.b64encode(image(number)).decode() for image in images]
        body = json.dumps({"images": encoded, "question": "what?", **fields}).encode()
        found, sent = await post(house, "/v1/vqa", body, "application/json")
        assert found == status, sent

    return ask


def uploaded(status: int, image: Callable[[int], bytes]) -> Ask:
    async def ask(house: House, number: int) -> None:
        found, sent = await post(house, "/v1/images", image(number), "image/png")
        assert found == status, sent

    return ask


def formed(path: str, status: int, image: Callable[[int], bytes], name: str = "image") -> Ask:
    async def ask(house: House, number: int) -> None:
        body, content_type = form({} if path == "/v1/images" else {"question": "what?"}, [image(number)], name)
        found, sent = await post(house, path, body, content_type)
        assert found == status, sent

    return ask


def chatted(status: int, image: Callable[[int], bytes], **fields: object) -> Ask:
    """A question as OpenAI's clients send it."""

    async def ask(house: House, number: int) -> None:
        url = "data:image/png;base64," + base64.b64encode(image(number)).decode()
        content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
        found, sent = await post(house, "/v1/chat/completions", json.dumps(body).encode(), "application/json")
        assert found == status, sent

    return ask


def batched(image: Callable[[int], bytes]) -> Ask:
    """Two questions, each of which may fail alone."""

    async def ask(house: House, number: int) -> None:
        encoded = base64.b64encode(image(number)).decode()
        body = "\n".join([json.dumps({"image": encoded, "question": "what?"})] * 2).encode()
        found, sent = await post(house, "/v1/vqa/batch", body, "application/jsonl")
        assert found == 200, sent

    return ask


def named(status: int, *, leaves: bool = False, **fields: object) -> Ask:
    """A question about an image that was sent before, which is deleted while the question is answered."""

    async def ask(house: House, number: int) -> None:
        _, sent = await post(house, "/v1/images", good(number), "image/png")
        image = json.loads(sent[1]["body"])["id"]
        body = json.dumps({"image": image, "question": "what?", **fields}).encode()
        house.vision.gate.clear()
        begun, leave = len(house.vision.calls), asyncio.Event()
        asked = asyncio.create_task(post(house, "/v1/vqa", body, "application/json", leave))
        await until(lambda: len(house.vision.calls) > begun)
        assert house.pipeline.images.store.held_bytes > SIZE
        await house.pipeline.images.delete(image, "")
        if leaves:
            leave.set()
        else:
            house.vision.gate.set()
        found, sent = await asked
        assert found == status, sent
        house.vision.gate.set()
        await until(lambda: house.admission.scheduler.used(Resource.VISION) == 0)

    return ask


def disconnected(*images: Callable[[int], bytes]) -> Ask:
    """A question whose caller goes away while its images are encoded."""

    async def ask(house: House, number: int) -> None:
        encoded = [base64.b64encode(image(number)).decode() for image in images]
        body = json.dumps({"images": encoded, "question": "what?"}).encode()
        house.vision.gate.clear()
        begun, leave = len(house.vision.calls), asyncio.Event()
        asked = asyncio.create_task(post(house, "/v1/vqa", body, "application/json", leave))
        await until(lambda: len(house.vision.calls) > begun)
        leave.set()
        await asked
        house.vision.gate.set()
        await until(lambda: house.admission.scheduler.used(Resource.VISION) == 0)

    return ask


def put(image: Callable[[int], bytes], *, fails: bool) -> Ask:
    """An upload over gRPC, in chunks."""

    async def ask(house: House, number: int) -> None:
        data = image(number)
        chunks = [data[start : start + 300_000] for start in range(0, len(data), 300_000)]
        del data

        async def message() -> bytes | None:
            return pb.PutImageRequest(data=chunks.pop(0)).SerializeToString() if chunks else None

        with pytest.raises(grpc.aio.AbortError) if fails else nullcontext():
            await VisualQuestionAnswering(house.rpc, Calls(house.rpc)).put_image(None, Context(message))

    return ask


def called(*, fails: bool = True, **fields: object) -> Ask:
    async def ask(house: House, number: int) -> None:
        messages = [
            pb.AnswerRequest(parts=[pb.Part(image=good(number)), pb.Part(text="what?")], **fields).SerializeToString()
        ]

        async def message() -> bytes | None:
            return messages.pop() if messages else None

        with pytest.raises(grpc.aio.AbortError) if fails else nullcontext():
            await VisualQuestionAnswering(house.rpc, Calls(house.rpc)).answer(None, Context(message))

    return ask


def cut_film(number: int) -> bytes:
    return film()[:-100] + number.to_bytes(2, "big") + bytes(SIZE)


def left(*images: Callable[[int], bytes]) -> Ask:
    """A call whose caller leaves while its images are encoded."""

    async def ask(house: House, number: int) -> None:
        parts = [*(pb.Part(image=image(number)) for image in images), pb.Part(text="what?")]
        messages = [pb.AnswerRequest(parts=parts).SerializeToString()]
        del parts

        async def message() -> bytes | None:
            return messages.pop() if messages else None

        house.vision.gate.clear()
        begun = len(house.vision.calls)
        service = VisualQuestionAnswering(house.rpc, Calls(house.rpc))
        call = asyncio.create_task(service.answer(None, Context(message)))
        await until(lambda: len(house.vision.calls) > begun)
        await cancelled(call)
        house.vision.gate.set()
        await until(lambda: house.admission.scheduler.used(Resource.VISION) == 0)

    return ask


def sleep(house: House) -> None:
    async def see(*_: object) -> None:
        await asyncio.sleep(60)

    house.vision.see = see


def hurry(house: House) -> None:
    """A batch may take 0.2 s, and its questions take longer."""
    house.api = http_api(replace(house.edge, batches=replace(house.edge.batches, timeout_s=0.2)))
    sleep(house)


def closed(house: House) -> None:
    house.vision.close("see")


CASES = {
    "an answer": (posted(200, good), nothing),
    "an answer about two images": (posted(200, good, good), nothing),
    "an answer that is streamed": (posted(200, good, stream=True), nothing),
    "a form": (formed("/v1/vqa", 200, good), nothing),
    "an upload": (uploaded(200, good), nothing),
    "an upload as a form": (formed("/v1/images", 200, good), nothing),
    "an upload that is no image": (uploaded(400, bad), nothing),
    "a question about what is no image": (posted(400, bad), nothing),
    "a form with what is no image": (formed("/v1/vqa", 400, bad), nothing),
    "one of two images is none": (posted(400, good, bad), nothing),
    "a video that is cut": (formed("/v1/vqa", 400, cut_film, "video"), nothing),
    "a wrong field": (posted(400, good, max_tokens=-1), nothing),
    "overload": (posted(429, good), overload),
    "overload, two images": (posted(429, good, good), overload),
    "vision fails": (posted(503, good), fail),
    "vision fails, two images": (posted(503, good, good), fail),
    "the time is over, two images": (posted(504, good, good, timeout_s=0.2), sleep),
    "the caller leaves": (disconnected(good), closed),
    "the caller leaves, two images": (disconnected(good, good), closed),
    "OpenAI, an answer": (chatted(200, good), nothing),
    "OpenAI, streamed": (chatted(200, good, stream=True), nothing),
    "OpenAI, what is no image": (chatted(400, bad), nothing),
    "an image by its id": (named(200), nothing),
    "an image by its id, streamed": (named(200, stream=True), nothing),
    "an image by its id, vision fails": (named(503), fault),
    "an image by its id, the caller leaves": (named(499, leaves=True), nothing),
    "a batch": (batched(good), nothing),
    "a batch that fails": (batched(good), fail),
    "a batch whose time is over": (batched(good), hurry),
    "gRPC, an upload": (put(good, fails=False), nothing),
    "gRPC, an upload that is no image": (put(bad, fails=True), nothing),
    "gRPC, the caller leaves": (left(good), closed),
    "gRPC, the caller leaves, two images": (left(good, good), closed),
    "gRPC, an answer": (called(fails=False), nothing),
    "gRPC, a wrong field": (called(max_tokens=10_000_000), nothing),
    "gRPC, overload": (called(), overload),
    "gRPC, vision fails": (called(), fail),
}


@pytest.mark.parametrize(("ask", "prepare"), CASES.values(), ids=CASES)
async def test_a_request_that_is_over_holds_nothing(house, collector_off, ask, prepare):
    prepare(house)
    await ask(house, 0)
    before, _ = tracemalloc.get_traced_memory()
    for number in range(1, TIMES + 1):
        await ask(house, number)
    await asyncio.sleep(0)
    held = tracemalloc.get_traced_memory()[0] - before
    assert held < STORED + SIZE, f"{held / TIMES / SIZE:.1f} images a request"
    assert house.pipeline.images.store.held_bytes == 0


async def test_questions_of_batches_hold_what_is_reserved_for_them_and_nothing_afterwards(house, collector_off):
    """Of many calls that each wait for a turn, and then for their caller's next message."""
    house.vision.close("see")
    ended = asyncio.Event()
    before, _ = tracemalloc.get_traced_memory()

    def call() -> Context:
        left = iter(range(8))

        async def message() -> bytes | None:
            if (number := next(left, None)) is None:
                await ended.wait()
                return None
            question = pb.AnswerRequest(parts=[pb.Part(image=good(number)), pb.Part(text="what?")])
            return pb.BatchRequest(index=number, question=question).SerializeToString()

        return Context(message)

    contexts = [call() for _ in range(6)]
    service = VisualQuestionAnswering(house.rpc, Calls(house.rpc))
    calls = [asyncio.create_task(service.batch(None, context)) for context in contexts]
    read = house.pipeline.batch_turns + len(contexts) - 1  # the first call has all turns, and one of each other waits
    await until(lambda: house.vision.calls and house.admission.quota.held.nbytes >= read * SIZE)
    held = tracemalloc.get_traced_memory()[0] - before
    assert held < 2.5 * house.admission.quota.held.nbytes  # a message, and what its question was made of
    house.vision.gate.set()
    await until(lambda: sum(context.written for context in contexts) == 48)
    assert house.admission.quota.held.nbytes == 0
    held = tracemalloc.get_traced_memory()[0] - before
    assert held < STORED + SIZE
    ended.set()
    await asyncio.gather(*calls)


async def test_batches_do_not_refuse_their_own_questions():
    """All questions of four calls of one tenant are more than the quota of bytes holds."""
    house = House(max_bytes_in_flight=12 * SIZE, max_image_bytes=2 * SIZE, image_store_bytes=STORED)
    results: list[pb.BatchResponse] = []

    def call() -> Context:
        left = iter(range(8))

        async def message() -> bytes | None:
            if (number := next(left, None)) is None:
                return None
            question = pb.AnswerRequest(parts=[pb.Part(image=good(number)), pb.Part(text="what?")])
            return pb.BatchRequest(index=number, question=question).SerializeToString()

        context = Context(message)

        async def write(result: pb.BatchResponse) -> None:
            results.append(result)

        context.write = write
        return context

    service = VisualQuestionAnswering(house.rpc, Calls(house.rpc))
    await asyncio.gather(*(service.batch(None, call()) for _ in range(4)))
    assert [result.error.message for result in results if result.HasField("error")] == []
    assert len(results) == 32
    assert house.admission.quota.held.nbytes == 0
    house.reader.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_each_question_of_a_batch_is_done_once_even_if_the_batch_ends_early(fails):
    house, done = House(), []
    batch = Batch(house.pipeline, Caller("", "trace", ""), asyncio.get_running_loop().time() + 60)

    async def questions() -> AsyncIterator[tuple[int, str]]:
        for index in range(6):
            yield index, f"question {index}"

    async def answer(index: int, question: str) -> str:
        await asyncio.sleep(0)
        return question

    async def write(index: int, result: object) -> None:
        if fails and index == 2:
            raise Unavailable("nobody reads")

    with pytest.raises(Unavailable) if fails else nullcontext():
        await batch.run(questions(), answer, write, done.append)
    assert len(done) == len(set(done))
    assert set(done) >= {"question 2"} if fails else len(done) == 6
    house.reader.close()
