"""Honest callers, and the ledger of every request and its end."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from benchmarks.bench.http_client import Aborted, HttpClient, Response
from benchmarks.bench.load import form
from benchmarks.bench.scenes import Scenes

TIMEOUT_S = 8.0  # of a request, as the service is told
HUNG_S = 12.0  # after that time the client gives up: the service broke its word
MAX_TOKENS = 24
PAUSE_S = (0.1, 0.3)  # of a client, between an answer and its next request
ID_AGE_S = 1800.0  # ids are sent again after half of their life
NEW_SHARE, STREAM_SHARE, CROSS_SHARE = 0.4, 0.5, 0.5
RECENT = 4  # images of one gateway that wait to be sent to the other

Kind = Literal["new", "follow_up"]
OK, CONNECTION, HUNG, FORGOTTEN = "ok", "connection", "hung", "image_not_found"


@dataclass(frozen=True, slots=True)
class Question:
    """One of the pool. Its scene is the number of an image modulo the number of scenes."""

    scene: int
    text: str
    detail: Literal["low", "high"]


@dataclass(slots=True)
class Entry:
    """One request in the ledger. Times are monotonic seconds."""

    gateway: str
    kind: Kind
    question: Question
    stream: bool
    sent: float
    ended: float = 0.0
    outcome: str = ""  # ok, an error's code, connection or hung
    ends: int = 0  # answers and errors that the response held
    answer: str = ""
    id_since: float | None = None  # when the gateway told the image's id

    @property
    def needs(self) -> frozenset[str]:
        """The models without which it cannot be answered."""
        needed = {"relevance_allocator", "qformer", "llm"}
        if self.kind == "new" or self.question.detail == "high":
            needed.add("vision_encoder")
        if self.question.detail == "high":
            needed.add("relevance_allocator_448")
        return frozenset(needed)


@dataclass(slots=True)
class Ledger:
    entries: list[Entry] = field(default_factory=list)
    in_flight: int = 0


class Images:
    """Numbers of images. A number that one gateway has seen is new to the other, which finds it in Redis."""

    def __init__(self, scenes: Scenes, rng: random.Random) -> None:
        self._new = count(len(scenes.files))
        self._rng = rng
        self._seen: dict[str, list[int]] = {"a": [], "b": []}  # by the other gateway only
        self._shared: set[int] = set()  # offered to the other gateway already

    def next_for(self, gateway: str) -> int:
        """Return the number of an image that this gateway has not seen."""
        if self._seen[gateway] and self._rng.random() < CROSS_SHARE:
            return self._seen[gateway].pop()
        return next(self._new)

    def answered(self, gateway: str, number: int) -> None:
        """Record that this gateway has encoded the image, and offer it to the other."""
        if number in self._shared:
            return
        self._shared.add(number)
        other = self._seen["b" if gateway == "a" else "a"]
        other.append(number)
        del other[:-RECENT]


class Asker:
    """Asks one gateway, one request at a time."""

    def __init__(self, gateway: str, port: int, scenes: Scenes) -> None:
        self.gateway = gateway
        self.scenes = scenes
        self.timeout_s = TIMEOUT_S
        self.ids: dict[int, tuple[str, float]] = {}  # by scene
        self._http = HttpClient("127.0.0.1", port)

    async def ask(self, entry: Entry, image: int) -> Entry:
        """Send the request and record its end. A follow-up is about a known scene, and names the image's id."""
        fields: dict[str, Any] = {
            "question": entry.question.text,
            "detail": entry.question.detail,
            "max_tokens": MAX_TOKENS,
            "timeout_s": self.timeout_s,
            "stream": entry.stream,
        }
        if entry.kind == "follow_up":
            name, entry.id_since = self.ids[entry.question.scene]
            body, kind = json.dumps(fields | {"image": name}).encode(), "application/json"
        else:
            body, kind = form(fields, [self.scenes.jpeg(image)])
        try:
            patience_s = self.timeout_s + HUNG_S
            async with asyncio.timeout(patience_s + 1):  # a connection can hang as well
                response = await self._http.post("/v1/vqa", body, kind, abort_after_s=patience_s)
            self._read(entry, response)
        except (Aborted, TimeoutError):
            entry.outcome = HUNG
        except OSError:
            entry.outcome, entry.ends = CONNECTION, 1
        entry.ended = time.monotonic()
        if entry.outcome == FORGOTTEN:
            self.ids.pop(entry.question.scene, None)
        return entry

    def _read(self, entry: Entry, response: Response) -> None:
        if entry.stream and response.status == 200:
            read_stream(entry, response.body)
            return
        found = json.loads(response.body)
        entry.ends = 1
        if response.status != 200:
            entry.outcome = found["error"]["code"]
            return
        entry.outcome, entry.answer = OK, found["answer"]
        if entry.kind == "new":
            self.ids[entry.question.scene] = (found["image_ids"][0], time.monotonic())

    def close(self) -> None:
        self._http.close()


def read_stream(entry: Entry, body: bytes) -> None:
    """Read server-sent events. Each answer, error or [DONE] that comes after the end counts as another end."""
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    done = lines.count(b"[DONE]")
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    ends = [event for event in events if "delta" not in event]
    entry.ends = max(len(ends), done) if lines and lines[-1] == b"[DONE]" else 0
    entry.answer = "".join(event["delta"] for event in events if "delta" in event)
    if ends:
        entry.outcome = ends[-1]["error"]["code"] if "error" in ends[-1] else OK
    else:
        entry.outcome = "unended"


class Client:
    """Asks one gateway again and again, with pauses."""

    def __init__(
        self, asker: Asker, pool: Sequence[Question], images: Images, ledger: Ledger, rng: random.Random
    ) -> None:
        self._asker = asker
        self._pool = pool
        self._images = images
        self._ledger = ledger
        self._rng = rng

    async def run(self, ended: asyncio.Event) -> None:
        """Ask until `ended`."""
        while not ended.is_set():
            entry, image = self._next()
            self._ledger.in_flight += 1
            try:
                await self._asker.ask(entry, image)
            finally:
                self._ledger.in_flight -= 1
            self._ledger.entries.append(entry)
            if entry.outcome == OK and entry.kind == "new":
                self._images.answered(entry.gateway, image)
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))

    def _next(self) -> tuple[Entry, int]:
        question = self._rng.choice(self._pool)
        _, since = self._asker.ids.get(question.scene, ("", 0.0))
        stream = self._rng.random() < STREAM_SHARE
        now = time.monotonic()
        if not since or now - since > ID_AGE_S:
            return Entry(self._asker.gateway, "new", question, False, now), question.scene
        if self._rng.random() < NEW_SHARE:
            image = self._images.next_for(self._asker.gateway)
            fitting = [each for each in self._pool if each.scene == image % len(self._asker.scenes.files)]
            question = self._rng.choice(fitting)
            return Entry(self._asker.gateway, "new", question, stream, now), image
        return Entry(self._asker.gateway, "follow_up", question, stream, now), question.scene


def pool_of(scenes: Scenes) -> list[Question]:
    """Make the fixed pool: for each scene two short questions, one long answer, and one closer look."""
    return [question for scene in range(len(scenes.files)) for question in _of_scene(scenes, scene)]


def _of_scene(scenes: Scenes, scene: int) -> Iterator[Question]:
    first, second = (row.question for row in scenes.rows[scene][:2])
    yield Question(scene, first, "low")
    yield Question(scene, second, "low")
    yield Question(scene, "describe the image.", "low")
    yield Question(scene, first, "high")
