"""Generate load in a separate process: `python -m benchmarks.bench.load`.

It reads a Plan as JSON from standard input and writes every request's Result as JSON to the plan's `out`. Times are
seconds since the load began. Open loop: a request is sent at its scheduled time, whether or not earlier ones have
ended, and its latency counts from that time. Closed loop: each client asks again when it gets an answer, and REFUSED_S
after a refusal. No request is sent after `duration_s`, and all sent requests are waited for.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import random
import resource
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import uvloop

from benchmarks.bench.http_client import Aborted, HttpClient, Response
from benchmarks.bench.scenes import Scenes
from benchmarks.bench.workloads import KNOWN, Ask, Workload, asks, bursts, poisson
from build_engines.evaluation.accuracy import is_right
from service.core.errors import GlimpseError
from service.text.prompt import load_tokenizer
from service.triton import TritonClient

EXPIRED = "expired"  # outcome of a request that was admitted, waited in the queue and was dropped there
WAITED = "waited in the queue"  # in Glimpse's message to such a request, and in no other refusal
LAG_INTERVAL_S = 0.005
REFUSED_S = (0.05, 0.2)  # a refused client of a closed loop asks again after so long
WARM_PAUSES_S = (1.0, 3.0, 10.0)  # pauses after failed attempts of a warm-up request


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests arrive: set exactly one of the three."""

    clients: int | None = None  # closed loop
    rate: float | None = None  # Poisson, requests/s
    burst: tuple[int, float] | None = None  # requests at once, seconds between bursts

    @property
    def label(self) -> str:
        if self.clients:
            return f"{self.clients} client{'s' if self.clients > 1 else ''}"
        if self.rate:
            return f"Poisson, {self.rate:.3g}/s"
        size, every_s = self.burst or (0, 0.0)
        return f"{size} at once every {every_s:g} s"

    def times(self, seed: int) -> Iterator[float]:
        """Return the arrival times of an open loop. Raises ValueError for a closed loop."""
        if self.rate:
            return poisson(self.rate, seed)
        if self.burst:
            return bursts(*self.burst)
        raise ValueError("a closed loop has no arrival times")


@dataclass(frozen=True, slots=True)
class Plan:
    """The load generator's input."""

    system: str  # the system's interface: glimpse, triton, naive or litserve
    urls: list[str]  # requests use these in turn
    workload: Workload
    arrivals: Arrivals
    duration_s: float
    max_tokens: int
    out: str
    requests: int | None = None  # upper limit
    seed: int = 0
    first_new: int = KNOWN
    warm: bool = True  # ask about the known images before the measurement
    warm_repeats: int = 0  # requests of the workload itself before the measurement
    timeout_s: float = 120.0
    pause_s: float = 0.0  # of a client of a closed loop, between an answer and its next request
    visual_tokens: tuple[int, int] | None = None  # the questions' budget; Glimpse only
    tokenizer: str = ""  # path of the LLM's, to count the tokens of an answer that comes as text
    scored: bool = False  # ask the questions as they are, and compare the answers with the right ones; Glimpse only

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        burst = fields["arrivals"].pop("burst")
        return cls(
            **fields
            | {
                "workload": Workload(**fields["workload"]),
                "arrivals": Arrivals(**fields["arrivals"], burst=tuple(burst) if burst else None),
                "visual_tokens": tuple(fields["visual_tokens"]) if fields["visual_tokens"] else None,
            }
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Result:
    """The outcome of one request. Times are seconds since the load began."""

    follow_up: bool
    at: float  # scheduled sending time
    sent: float = 0.0
    first: float | None = None  # time of the first event with text
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)  # seconds between the events of a stream
    tokens: int = 0
    outcome: str = "ok"  # else the error's code, or `cancelled`
    cache: str | None = None
    text_tokens: int = 0  # of the prompt
    vision_tokens: int = 0
    visual_tokens: int = 0
    reduced: bool = False  # looked less closely than requested
    right: bool | None = None  # None: not scored, or no answer


class Asker(Protocol):
    """One system's interface. Fills in the result; raises AskFailed, Aborted."""

    async def ask(self, ask: Ask, result: Result) -> None: ...


class AskFailed(Exception):
    """The system refused the request; the message is its error code."""


class Clock:
    def __init__(self) -> None:
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began


@dataclass(slots=True)
class Heard:
    """Record when the events of one answer arrive. One has a token or more."""

    clock: Clock
    result: Result
    last: float | None = None

    def event(self) -> None:
        now = self.clock.now()
        if self.last is None:
            self.result.first = now
        else:
            self.result.gaps.append(now - self.last)
        self.last = now


class GlimpseAsker:
    """Ask Glimpse and stream the answer; a follow-up names its image by the id from an earlier answer.

    Gateways are asked in turn. If one is dead, the next one is asked, as a load balancer does.
    """

    def __init__(self, plan: Plan, clock: Clock, scenes: Scenes, clients: list[HttpClient]) -> None:
        self._plan, self._clock, self._scenes = plan, clock, scenes
        self._gateways = deque((client, dict[int, str]()) for client in clients)  # each knows other ids

    async def ask(self, ask: Ask, result: Result) -> None:
        row = self._scenes.row(ask.images[0], ask.question)
        fields: dict[str, Any] = {
            "question": row.question if self._plan.scored else self._scenes.question(ask.images[0], ask.question),
            "max_tokens": self._plan.max_tokens,
            "stream": True,
            "timeout_s": self._plan.timeout_s,
        }
        if self._plan.visual_tokens:
            fields["budget"] = {"visual_tokens": list(self._plan.visual_tokens)}
        self._gateways.rotate(-1)
        *others, last = self._gateways
        for client, ids in others:
            try:
                answer = await self._answer(client, ids, ask, fields, result)
            except OSError:
                if result.first is not None:
                    raise
            else:
                break
        else:
            answer = await self._answer(*last, ask, fields, result)
        if self._plan.scored:
            result.right = is_right(answer, row)

    async def _answer(
        self, client: HttpClient, ids: dict[int, str], ask: Ask, fields: dict[str, Any], result: Result
    ) -> str:
        """Return the answer's text. Raises AskFailed, Aborted, OSError."""
        known = ids.get(ask.images[0]) if ask.follow_up else None
        if known:
            body, kind = json.dumps(fields | {"image": known}).encode(), "application/json"
        else:
            body, kind = form(fields, [self._scenes.jpeg(number) for number in ask.images])
        heard = Heard(self._clock, result)

        def piece(data: bytes) -> None:
            if b'"delta"' in data:
                heard.event()

        response = await client.post("/v1/vqa", body, kind, piece, ask.cancel_after_s)
        pieces, end = self._events_of(response)
        result.tokens = end["usage"]["completion_tokens"]
        result.text_tokens = end["usage"]["prompt_tokens"]
        result.cache = end["vision"]["cache"]
        result.vision_tokens = end["vision"]["vision_tokens"]
        result.visual_tokens = end["vision"]["visual_tokens"]
        result.reduced = end["vision"].get("reduced", False)
        if result.first is None:  # the answer has no text
            result.first = self._clock.now()
        for number, name in zip(ask.images, end["image_ids"], strict=True):
            if number < KNOWN:
                ids[number] = name
        return "".join(pieces)

    @staticmethod
    def _events_of(response: Response) -> tuple[Iterator[str], dict[str, Any]]:
        """Return the pieces of the text, and the last event, which has all other fields. Raises AskFailed."""
        if response.status != 200:
            error = json.loads(response.body)["error"]
            raise AskFailed(EXPIRED if WAITED in error["message"] else error["code"])
        events = [line[6:] for line in response.body.split(b"\n") if line.startswith(b"data: {")]
        end: dict[str, Any] = json.loads(events[-1])
        if "error" in end:
            raise AskFailed(end["error"]["code"])
        return (json.loads(event)["delta"] for event in events[:-1] if b'"delta"' in event), end


class PlainAsker:
    """Ask a server that sends one JSON answer at the end.

    `naive` takes a form and LitServe takes JSON with base64, as in their documentation.
    """

    def __init__(self, plan: Plan, clock: Clock, scenes: Scenes, clients: list[HttpClient]) -> None:
        self._plan, self._clock, self._scenes = plan, clock, scenes
        self._clients = itertools.cycle(clients)

    async def ask(self, ask: Ask, result: Result) -> None:
        question = self._scenes.question(ask.images[0], ask.question)
        fields = {"question": question, "max_tokens": self._plan.max_tokens}
        images = [self._scenes.jpeg(number) for number in ask.images]
        if self._plan.system == "litserve":
            path, kind = "/predict", "application/json"
            body = json.dumps(fields | {"image": base64.b64encode(images[0]).decode()}).encode()
        else:
            path = "/ask"
            body, kind = form(fields, images)
        response = await next(self._clients).post(path, body, kind, None, ask.cancel_after_s)
        if response.status != 200:
            raise AskFailed(f"http_{response.status}")
        result.first = self._clock.now()
        result.tokens = json.loads(response.body)["tokens"]


class TritonAsker:
    """Ask the `vqa` ensemble over gRPC, as in NVIDIA's own layout; it always streams."""

    def __init__(self, plan: Plan, clock: Clock, scenes: Scenes, clients: list[TritonClient]) -> None:
        self._plan, self._clock, self._scenes = plan, clock, scenes
        self._clients = itertools.cycle(clients)
        self._tokenizer = load_tokenizer(Path(plan.tokenizer))

    async def ask(self, ask: Ask, result: Result) -> None:
        heard = Heard(self._clock, result)
        pieces = next(self._clients).answer(
            self._scenes.jpeg(ask.images[0]),
            self._scenes.question(ask.images[0], ask.question),
            max_tokens=self._plan.max_tokens,
            timeout_s=self._plan.timeout_s,
            stall_timeout_s=self._plan.timeout_s,
        )
        try:
            text = b""
            async for piece in pieces:
                heard.event()
                text += piece
            result.tokens = len(self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids)
        except GlimpseError as error:
            raise AskFailed(error.code) from error
        finally:
            await pieces.aclose()


def form(fields: dict[str, Any], images: list[bytes], name: str = "image") -> tuple[bytes, str]:
    """Return a multipart/form-data body, whose files have this field's name, and its content type."""
    boundary = b"glimpse-bench-7f3a"
    parts = [
        b'--%b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        % (boundary, key.encode(), (value if isinstance(value, str) else json.dumps(value)).encode())
        for key, value in fields.items()
    ]
    parts += [
        b'--%b\r\ncontent-disposition: form-data; name="%b"; filename="i.jpg"\r\ncontent-type: image/jpeg\r\n\r\n%b'
        b"\r\n" % (boundary, name.encode(), image)
        for image in images
    ]
    return b"".join([*parts, b"--%b--\r\n" % boundary]), f"multipart/form-data; boundary={boundary.decode()}"


@asynccontextmanager
async def asker_of(plan: Plan, clock: Clock) -> AsyncIterator[Asker]:
    scenes = Scenes.load()
    async with AsyncExitStack() as stack:
        if plan.system == "triton":
            tritons = [await stack.enter_async_context(TritonClient(url, url)) for url in plan.urls]
            yield TritonAsker(plan, clock, scenes, tritons)
        else:
            clients = [HttpClient(urlsplit(url).hostname or "", urlsplit(url).port or 80) for url in plan.urls]
            for client in clients:
                stack.callback(client.close)
            kind = GlimpseAsker if plan.system == "glimpse" else PlainAsker
            yield kind(plan, clock, scenes, clients)


class Load:
    """Run one measurement."""

    def __init__(self, plan: Plan, asker: Asker, clock: Clock) -> None:
        self.plan = plan
        self.results: list[Result] = []
        self.lags_s: list[float] = []
        self._asker = asker
        self._clock = clock
        self._asks = asks(plan.workload, plan.seed, plan.first_new)

    async def warm(self) -> None:
        """Send the requests before the measurement. Raises RuntimeError if one keeps failing."""
        first = [Ask((number,), number, follow_up=False) for number in range(KNOWN if self.plan.warm else 2)]
        first += itertools.islice(self._asks, self.plan.warm_repeats)
        gate = asyncio.Semaphore(4)

        async def one(ask: Ask) -> None:
            async with gate:
                for pause_s in WARM_PAUSES_S:
                    if (result := await self._one(ask, self._clock.now())).outcome in ("ok", "cancelled"):
                        return
                    await asyncio.sleep(pause_s)
            raise RuntimeError(f"a warm-up request failed: {result.outcome}")

        async with asyncio.TaskGroup() as tasks:
            for ask in first:
                tasks.create_task(one(ask))
        self.results.clear()
        self._clock.began = time.perf_counter()

    async def run(self) -> None:
        """Ask until the plan's time is over, and measure meanwhile how late this process's own loop is."""
        watch = asyncio.create_task(self._watch())
        try:
            await self._ask_all()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while True:
            due = self._clock.now() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.lags_s.append(max(self._clock.now() - due, 0.0))

    async def _ask_all(self) -> None:
        if self.plan.requests is not None:
            self._asks = itertools.islice(self._asks, self.plan.requests)
        await (self._closed(self.plan.arrivals.clients) if self.plan.arrivals.clients else self._open())

    async def _closed(self, clients: int) -> None:
        async def client() -> None:
            while self._clock.now() < self.plan.duration_s:
                ask = next(self._asks, None)
                if ask is None:
                    return
                found = await self._one(ask, self._clock.now())
                await asyncio.sleep(self.plan.pause_s)
                if found.outcome not in ("ok", "cancelled"):
                    await asyncio.sleep(random.uniform(*REFUSED_S))

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for at in self.plan.arrivals.times(self.plan.seed):
                if at >= self.plan.duration_s or (ask := next(self._asks, None)) is None:
                    break
                await asyncio.sleep(max(at - self._clock.now(), 0))
                tasks.create_task(self._one(ask, at))

    async def _one(self, ask: Ask, at: float) -> Result:
        result = Result(ask.follow_up, at, sent=self._clock.now())
        try:
            async with asyncio.timeout(self.plan.timeout_s + 5):
                await self._asker.ask(ask, result)
        except AskFailed as failure:
            result.outcome = str(failure)
        except Aborted:
            result.outcome = "cancelled"
        except (TimeoutError, OSError) as error:
            result.outcome = type(error).__name__
        result.end = self._clock.now()
        self.results.append(result)
        return result


async def measure(plan: Plan) -> dict[str, Any]:
    clock = Clock()
    async with asker_of(plan, clock) as asker:
        load = Load(plan, asker, clock)
        await load.warm()
        sys.stdout.write("begin\n")  # the parent reads the system's CPU seconds now
        sys.stdout.flush()
        sys.stdin.readline()
        clock.began = time.perf_counter()
        used = resource.getrusage(resource.RUSAGE_SELF)
        with contextlib.suppress(asyncio.CancelledError):
            await load.run()
        spent = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
        return {
            "elapsed_s": clock.now(),
            "cpu_s": cpu_s,
            "lags_s": load.lags_s,
            "results": [asdict(each) for each in load.results],
        }


def main() -> None:
    plan = Plan.from_json(sys.stdin.readline())
    found = uvloop.run(measure(plan))
    Path(plan.out).write_text(json.dumps(found))
    sys.stdout.write("end\n")  # the parent reads the CPU seconds again
    sys.stdout.flush()


if __name__ == "__main__":
    main()
