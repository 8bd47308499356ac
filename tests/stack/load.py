"""Clients that ask all the time, and remember how each question ended."""

from __future__ import annotations

import base64
import io
import random
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import httpx
from PIL import Image, ImageDraw

from tests.support.servers import eventually

QUESTION = "how many objects are there?"
# A slow machine is no fault: what the tests look for are requests that are lost.
TIMEOUT_S = 120
ANSWERS_S = 300


@dataclass(frozen=True)
class Outcome:
    """Times are of time.monotonic()."""

    kind: str
    began: float
    ended: float
    fault: str  # empty if it was answered

    def was_in_flight_at(self, moment: float) -> bool:
        return self.began <= moment <= self.ended


def picture(seed: int) -> str:
    """Some image that no other seed gives, as base64."""
    draw = random.Random(seed)
    image = Image.new("RGB", (256, 256), (235, 235, 235))
    canvas = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, side = draw.randrange(200), draw.randrange(200), draw.randrange(20, 56)
        canvas.rectangle((x, y, x + side, y + side), fill=tuple(draw.randrange(256) for _ in range(3)))
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


class Load:
    """Eight clients: new images, known images and streams. Every second client keeps the balancer's cookie."""

    def __init__(self, url: str, clients: int = 8) -> None:
        self.outcomes: list[Outcome] = []
        self._url = url
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(clients)]
        self._known = [picture(seed) for seed in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for(16)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.fault]

    def wait_for(self, answers: int) -> None:
        """Until so many more questions are answered."""
        before = len(self.outcomes) - len(self.faults)
        eventually(
            lambda: len(self.outcomes) - len(self.faults) >= before + answers, ANSWERS_S, f"{answers} answers more"
        )

    def go_on_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        eventually(lambda: time.monotonic() >= end, seconds + 5, "time")

    def _ask_on(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S + 10, trust_env=False) as client:
            asked = 0
            while not self._stopping.is_set():
                asked += 1
                if number % 2:
                    client.cookies.clear()
                kind = ("new", "known", "stream")[(number + asked) % 3]
                image = picture(1_000_000 * (number + 1) + asked) if kind == "new" else self._known[asked % 4]
                began = time.monotonic()
                fault = ask(client, image, stream=kind == "stream")
                self.outcomes.append(Outcome(kind, began, time.monotonic(), fault))


def ask(client: httpx.Client, image: str, *, stream: bool) -> str:
    """Why there was no answer; empty if there was one."""
    body = {"image": image, "question": QUESTION, "max_tokens": 8, "stream": stream, "timeout_s": TIMEOUT_S}
    try:
        if not stream:
            answer = client.post("/v1/vqa", json=body)
            return "" if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:200]}"
        with client.stream("POST", "/v1/vqa", json=body) as events:
            lines = [line for line in events.iter_lines() if line]
    except httpx.HTTPError as exc:
        return repr(exc)
    errors = [line for line in lines if '"error"' in line]
    if events.status_code != 200 or errors or lines[-1:] != ["data: [DONE]"]:
        return f"{events.status_code}: {errors or lines[-1:]}"
    return ""
