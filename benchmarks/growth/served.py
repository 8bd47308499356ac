"""Ask a gateway over HTTP, and measure latencies, answers a second and CPU time.

Every answer has exactly `max_tokens` tokens: its regular expression asks for more digits than that. Questions are drawn
at random, so no answer comes from an exact repeat, and each answer is checked for what was to be measured: the tokens
of the prompt and of the answer, and whether the image was known.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.bench.http_client import HttpClient
from benchmarks.bench.load import form
from benchmarks.bench.processes import DECODER, TICKS, Process, cpu_by_role
from benchmarks.bench.scenes import Scenes
from benchmarks.bench.systems import Running
from benchmarks.growth.curves import Curve, Figures, Found, percentile, schedule, steps

# Settings of the measured gateway. None limits a size of an axis; elastic fidelity would cost less under load; and an
# equal question would be answered from the cache of visual tokens.
SETTINGS = {
    "ELASTIC_FIDELITY": "false",
    "VISUAL_CACHE_BYTES": "0",
    "MAX_REQUESTS_IN_FLIGHT": "512",
    "STALL_TIMEOUT_S": "120",
    "DECODE_CPU_S": "60",
    "BODY_TIMEOUT_S": "120",
}
TIMEOUT_S = 120.0  # of a question
KNOWN = 16  # images that follow-ups are about
QUESTION, ANSWER = 6, 8  # tokens on every other axis
TEMPLATE, TURN = 5, 5  # tokens of a prompt around its question, and of an earlier turn around its two words
LEAST = 10  # answers of a point
APART_S = 0.02  # between the first questions of two clients
RETRY_S = (0.5, 1.5)  # a refused client asks again after so long; its latency counts from its first try
DIGITS = "([0-9]{256}){2}"  # each digit is a token: no answer is this long, so max_tokens ends it
# Each word is one token, with the space before it.
VOCABULARY = (
    "what which how many colour color shape size character object objects image small medium large circle circles ring "
    "rings cross crosses star stars square squares triangle triangles shapes red green blue yellow pink purple orange "
    "cyan left right above below than with there does have has bigger smaller read say see the is are of and or on in"
)
WORDS = VOCABULARY.split()
GATEWAY = ("gateway", DECODER, "worker", "other")  # roles of its processes; all others are Triton's
JPEG_QUALITY = 90
FORMATS = ("PNG of noise", "BMP", "JPEG")


class Refused(Exception):
    """The service has too many open requests, or its loop is late: 429."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and what its answer must tell."""

    body: bytes
    content_type: str
    usage: Mapping[str, int]
    cache: str  # hit or miss
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: each client sends its next question when it has its answer."""

    make: Callable[[], Ask]
    clients: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Curve):
    load: Callable[[Asker, int], Load]


class Window:
    """Measure from the moment when every client has had an answer: the first wave waits less than the later ones.

    It closes after some seconds, once LEAST requests sent in it are answered, and one of each client; at the latest
    TIMEOUT_S later. CPU time and answers count until then. Latencies are those of all requests sent in it: they are
    waited for under the same load, for TIMEOUT_S at most.
    """

    def __init__(self, system: Running, clients: int, seconds: float) -> None:
        self._system = system
        self._seconds = seconds
        self._new = set(range(clients))  # clients without an answer
        self._due = set(range(clients))  # clients without an answer to a request that they sent in the window
        self._sent: dict[int, float] = {}  # by client: when it sent its request of the window that is not answered
        self._opened_at = self._closed_at = 0.0
        self._before: list[Process] = []
        self._took_s: list[float] = []
        self._answers = self._refusals = 0
        self._spent: Figures = {}

    @property
    def is_over(self) -> bool:
        """Whether it has closed, and every request sent in it is answered or has timed out."""
        is_late = time.perf_counter() > self._closed_at + TIMEOUT_S
        return bool(self._closed_at) and (not self._sent or is_late)

    def _is_open(self) -> bool:
        return not self._new and not self._closed_at

    def sent(self, client: int) -> None:
        if self._is_open():
            self._sent[client] = time.perf_counter()

    def refused(self) -> None:
        if self._is_open():
            self._refusals += 1
            self._close_if_done()

    def answered(self, client: int) -> None:
        if client in self._new:
            self._new.discard(client)
            if not self._new:
                self._opened_at, self._before = time.perf_counter(), self._system.processes()
            return
        if client in self._sent:
            self._took_s.append(time.perf_counter() - self._sent.pop(client))
            self._due.discard(client)
        if self._is_open():
            self._answers += 1
            self._close_if_done()

    def _close_if_done(self) -> None:
        now = time.perf_counter()
        lasted_s = now - self._opened_at
        has_all = len(self._took_s) >= LEAST and not self._due
        if lasted_s >= self._seconds and (has_all or lasted_s >= self._seconds + TIMEOUT_S):
            self._closed_at = now
            self._spent = self._spent_in(lasted_s)

    def _spent_in(self, seconds: float) -> Figures:
        answers = max(self._answers, 1)
        spent = cpu_by_role(self._before, self._system.processes())
        own = sum(cpu_s for role, cpu_s in spent.items() if role in GATEWAY)

        def a_request_ms(cpu_s: float) -> float:
            return max(cpu_s, 0.5 / TICKS) * 1e3 / answers  # less than a tick of the kernel counts as half of one

        return {
            "gateway_cpu_ms": a_request_ms(own),
            "triton_cpu_ms": a_request_ms(sum(spent.values()) - own),
            "answers_per_s": answers / seconds,
            "ms_an_answer": seconds * 1e3 / answers,
            "refusals_an_answer": self._refusals / answers,
        }

    def figures(self) -> Figures:
        """Return the figures. A request that has timed out counts with the time for which it was waited for."""
        now = time.perf_counter()
        took_s = [*self._took_s, *(now - sent_at for sent_at in self._sent.values())]
        latencies = {"p50_ms": percentile(took_s, 0.5) * 1e3, "p95_ms": percentile(took_s, 0.95) * 1e3}
        return latencies | dict(self._spent) | {"unanswered": float(len(self._sent))}


class Asker:
    """Make and send the questions. `known` are ids of images whose features the gateway has."""

    def __init__(self, system: Running, seed: int) -> None:
        url = urlsplit(system.urls[0])
        self.random = random.Random(seed)
        self.known: list[str] = []
        self.scenes = Scenes.load(KNOWN)
        # Numbers of images that no earlier run has sent to this gateway.
        self.new = itertools.count(self.random.randrange(10**9, 10**12))
        self._http = HttpClient(url.hostname or "", url.port or 80)
        self._system = system

    def close(self) -> None:
        self._http.close()

    async def remember(self) -> None:
        """Ask about each known image with its bytes: many new images may have pushed out its features and its id."""
        files = [self.scenes.jpeg(number) for number in range(KNOWN)]
        asks = [self.about_file(file, cache="", answer=1) for file in files]
        self.known = [(await self.answer(ask))["image_ids"][0] for ask in asks]

    async def spend(self, load: Load, seconds: float) -> Figures:
        """Run the load for some seconds -> figures. Raises RuntimeError if an answer is not as it should be."""
        window = Window(self._system, load.clients, seconds)

        async def client(number: int) -> None:
            await asyncio.sleep(number * APART_S)
            while not window.is_over:
                ask = load.make()
                window.sent(number)
                while not window.is_over:
                    try:
                        await self.answer(ask)
                        window.answered(number)
                        break
                    except Refused:
                        window.refused()
                        await asyncio.sleep(self.random.uniform(*RETRY_S))

        await asyncio.gather(*(client(number) for number in range(load.clients)))
        return window.figures()

    async def answer(self, ask: Ask) -> dict[str, Any]:
        """Raises Refused, and RuntimeError if the answer is not as it should be."""
        found = await self.post("/v1/vqa", ask.body, ask.content_type, ask.headers)
        told = found["usage"], found["vision"]["cache"]
        if any(told[0][name] != count for name, count in ask.usage.items()) or ask.cache not in ("", told[1]):
            raise RuntimeError(f"the answer is not as it should be ({ask.usage}, {ask.cache}): {found}")
        return found

    async def post(self, path: str, body: bytes, content_type: str, headers: Mapping[str, str]) -> dict[str, Any]:
        """Raises Refused, and RuntimeError for any other status than 200."""
        response = await self._http.post(path, body, content_type, headers=headers)
        if response.status == 429:
            raise Refused(response.body.decode())
        if response.status != 200:
            raise RuntimeError(f"{path} was answered with {response.status}: {response.body[:500]!r}")
        found: dict[str, Any] = json.loads(response.body)
        return found

    def words(self, count: int) -> str:
        """Draw a text of so many tokens."""
        return " ".join(self.random.choices(WORDS, k=count))

    def about(
        self,
        images: Sequence[str],
        *,
        cache: str = "hit",
        question: int = QUESTION,
        answer: int = ANSWER,
        turns: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Ask:
        """Ask about images by their ids, or as base64, with so many tokens of question and answer."""
        earlier = [{"question": self.words(1), "answer": self.words(1)} for _ in range(turns)]
        fields = fields_of(self.words(question), answer) | {"images": list(images), "turns": earlier}
        usage = {"prompt_tokens": TEMPLATE + question + turns * (TURN + 2), "completion_tokens": answer}
        return Ask(json.dumps(fields).encode(), "application/json", usage, cache, headers or {})

    def about_file(self, file: bytes, *, cache: str = "miss", answer: int = ANSWER) -> Ask:
        """Ask about an image with its bytes, in a form."""
        body, content_type = form(fields_of(self.words(QUESTION), answer), [file])
        return Ask(body, content_type, {"completion_tokens": answer}, cache)

    def new_image(self) -> str:
        """Return an image that the gateway has not seen, as base64."""
        return base64.b64encode(self.scenes.jpeg(next(self.new))).decode()


def fields_of(question: str, answer: int) -> dict[str, Any]:
    return {"question": question, "max_tokens": answer, "regex": DIGITS, "timeout_s": TIMEOUT_S}


def follow_ups(
    asker: Asker, *, clients: int = 1, images: int = 1, question: int = QUESTION, answer: int = ANSWER, turns: int = 0
) -> Load:
    def make() -> Ask:
        known = asker.random.sample(asker.known, images)
        return asker.about(known, question=question, answer=answer, turns=turns)

    return Load(make, clients)


def new_images(asker: Asker, *, clients: int = 1, images: int = 1) -> Load:
    return Load(lambda: asker.about([asker.new_image() for _ in range(images)], cache="miss"), clients)


def files(asker: Asker, kilobytes: int, *, kind: str) -> Load:
    """A decoder does not see what follows the picture: a number there makes each file a new one."""
    file = file_of(kind, kilobytes * 1000)
    return Load(lambda: asker.about_file(file[:-8] + next(asker.new).to_bytes(8)))


@cache
def file_of(kind: str, nbytes: int) -> bytes:
    """Draw an image whose file has so many bytes, a few percent of them zeros behind the picture.

    PNG and BMP take about three bytes a pixel of noise. The JPEG has less noise, and about 0.6 bytes a pixel.
    """
    side = math.isqrt(int(0.97 * nbytes / (jpeg_bytes_a_pixel() if kind == "JPEG" else 3)))
    out = io.BytesIO()
    if kind == "JPEG":
        grainy(side).save(out, "JPEG", quality=JPEG_QUALITY)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(noise).save(out, kind.partition(" ")[0], **({"compress_level": 1} if "PNG" in kind else {}))
    file = out.getvalue()
    if not 0.9 * nbytes <= len(file) <= nbytes - 8:
        raise RuntimeError(f"a {kind} of {side}x{side} pixels has {len(file):,} bytes instead of {nbytes:,}")
    return file.ljust(nbytes, b"\0")


@cache
def jpeg_bytes_a_pixel() -> float:
    out = io.BytesIO()
    grainy(1024).save(out, "JPEG", quality=JPEG_QUALITY)
    return len(out.getvalue()) / 1024**2


def grainy(side: int) -> Image.Image:
    """Draw grey with some noise, the same every 256 pixels."""
    tile = np.random.default_rng(0).normal(128, 30, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    times = -(-side // 256)
    return Image.fromarray(np.tile(tile, (times, times, 1))[:side, :side])


ONE_CLIENT = {"p50_ms": 1, "p95_ms": 1, "gateway_cpu_ms": 1, "triton_cpu_ms": 1}
# Clients wait for each other. But what one request takes is not their doing, and answers do not become fewer.
MANY_CLIENTS = {"p50_ms": 1, "p95_ms": 1, "gateway_cpu_ms": 0, "triton_cpu_ms": 0, "ms_an_answer": 0}
ONE = "one client"
A_FOLLOW_UP = f"a known image, {QUESTION} question tokens, {ANSWER} answer tokens, no turns"


CURVES = (
    Served(axis="clients", name="follow-ups", sizes=steps(1, 256, 9), counted="clients", causes=MANY_CLIENTS,
           holds=A_FOLLOW_UP, load=lambda asker, size: follow_ups(asker, clients=size)),
    Served(axis="clients", name="new images", sizes=steps(1, 256, 9), counted="clients", causes=MANY_CLIENTS,
           holds=A_FOLLOW_UP.replace("known image", "new image of 224x224 pixels"),
           load=lambda asker, size: new_images(asker, clients=size)),
    *(
        Served(axis="image_bytes", name=kind, sizes=steps(100, 20_000, 9),
               counted="kB of the file", causes=ONE_CLIENT,
               holds=f"{ONE}, {A_FOLLOW_UP.replace('known', 'new')}; pixels grow with the bytes",
               load=partial(files, kind=kind))
        for kind in FORMATS
    ),
    Served(axis="question_tokens", name="follow-ups", sizes=steps(1, 200, 9), counted="tokens of the question",
           causes=ONE_CLIENT, holds=f"{ONE}, a known image, {ANSWER} answer tokens, no turns",
           load=lambda asker, size: follow_ups(asker, question=size)),
    Served(axis="answer_tokens", name="follow-ups", sizes=steps(1, 256, 9), counted="tokens of the answer",
           causes=ONE_CLIENT, holds=f"{ONE}, a known image, {QUESTION} question tokens, no turns",
           load=lambda asker, size: follow_ups(asker, answer=size)),
    Served(axis="turns", name="follow-ups", sizes=steps(1, 21, 9), counted="earlier turns + 1",
           causes=ONE_CLIENT, holds=f"{ONE}, {A_FOLLOW_UP.rpartition(',')[0]}; a turn has {TURN + 2} tokens",
           load=lambda asker, size: follow_ups(asker, turns=size - 1)),
    Served(axis="images", name="known images", sizes=steps(1, 8, 6), counted="images of a request",
           causes=ONE_CLIENT, holds=f"{ONE}, {A_FOLLOW_UP.partition(', ')[2]}",
           load=lambda asker, size: follow_ups(asker, images=size)),
    Served(axis="images", name="new images", sizes=steps(1, 8, 6), counted="images of a request",
           causes=ONE_CLIENT, holds=f"{ONE}, 224x224 pixels, {A_FOLLOW_UP.partition(', ')[2]}",
           load=lambda asker, size: new_images(asker, images=size)),
)  # fmt: skip


async def measure(
    system: Running, curves: Sequence[Served], rounds: int, seconds: float, seed: int
) -> dict[tuple[str, str], Found]:
    """Measure all points of these curves on one service -> figures by curve, size and round."""
    asker = Asker(system, seed)
    found: dict[tuple[str, str], Found] = {curve.key: {size: [] for size in curve.sizes} for curve in curves}
    for curve, size in schedule(curves, rounds, seed):
        await asker.remember()
        figures = await asker.spend(curve.load(asker, size), seconds)
        found[curve.key][size].append(figures)
        tell_point(curve, size, figures)
    asker.close()
    return found


def tell_point(curve: Curve, size: int, figures: Figures) -> None:
    """Show on standard error how far the measurement is."""
    told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
    sys.stderr.write(f"{curve.axis}, {curve.name}, {size:,}: {told}\n")
