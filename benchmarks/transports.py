"""Compare the latency of one question over the ways to ask it.

    python -m benchmarks.transports          # starts its own server, measures, stops it

One client asks short questions about images that were sent before (follow-ups), each one over every way in turn, in
an order that changes from question to question. Every way has a connection of its own. `vqa again` is `vqa` once more:
its difference is the noise. The cache of visual tokens is off, or the second way would find what the first one left.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import grpc

from benchmarks.arguments import count
from benchmarks.bench.models import REFERENCE
from benchmarks.bench.systems import Running, gateway
from benchmarks.figures import tell
from build_engines.evaluation.accuracy import SCENES, rows
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub

MAX_TOKENS = 8
WARM_UP = 30  # questions before the measured ones
MODEL = "glimpse-reference"

Question = tuple[str, str]  # an image's id and a text
Ask = Callable[[str, str], str]


class Http:
    """One connection to the gateway, which is kept."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> bytes:
        """Raises RuntimeError for a status other than 200."""
        self._connection.request("POST", path, body, {"content-type": content_type})
        response = self._connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise RuntimeError(f"POST {path} gave {response.status}: {said!r}")
        return said


def vqa(running: Running) -> Ask:
    connection = Http(running.urls[0])

    def ask(image: str, question: str) -> str:
        body = {"image": image, "question": question, "max_tokens": MAX_TOKENS}
        return str(json.loads(connection.post("/v1/vqa", json.dumps(body).encode()))["answer"])

    return ask


def chat(running: Running) -> Ask:
    connection = Http(running.urls[0])

    def ask(image: str, question: str) -> str:
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image}}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS}
        said = json.loads(connection.post("/v1/chat/completions", json.dumps(body).encode()))
        return str(said["choices"][0]["message"]["content"])

    return ask


def rpc(running: Running) -> Ask:
    stub = VisualQuestionAnsweringStub(grpc.insecure_channel(running.rpc))

    def ask(image: str, question: str) -> str:
        parts = [pb.Part(image_id=image), pb.Part(text=question)]
        return str(stub.Answer(pb.AnswerRequest(parts=parts, max_tokens=MAX_TOKENS), timeout=60).answer)

    return ask


# Each way's name, and what opens its connection. The first one is what the others are compared with.
WAYS: dict[str, Callable[[Running], Ask]] = {"vqa": vqa, "vqa again": vqa, "chat": chat, "grpc": rpc}


def questions(running: Running, count: int) -> Iterator[Question]:
    """Send each image once, and yield short questions about it by its id."""
    connection = Http(running.urls[0])
    asked = [row for row in rows(SCENES) if row.type != "describe"]
    ids: dict[str, str] = {}
    for step in range(count):
        row = asked[step * 7 % len(asked)]
        if row.image not in ids:
            file = (SCENES / row.image).read_bytes()
            ids[row.image] = json.loads(connection.post("/v1/images", file, "image/webp"))["id"]
            vqa(running)(ids[row.image], "how many objects are there?")  # so that every way finds its features
        yield ids[row.image], row.question


def measure(running: Running, count: int) -> dict[str, dict[str, float]]:
    """Ask every question over every way -> milliseconds by way. Raises RuntimeError if answers differ."""
    ways = {name: connect(running) for name, connect in WAYS.items()}
    took_ms: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffled = list(ways), random.Random(0)
    for step, (image, question) in enumerate(questions(running, count + WARM_UP)):
        shuffled.shuffle(order)
        answers = {}
        for name in order:
            started = time.perf_counter()
            answers[name] = ways[name](image, question)
            if step >= WARM_UP:
                took_ms[name].append((time.perf_counter() - started) * 1e3)
        if len(set(answers.values())) != 1:
            raise RuntimeError(f"{question!r} has different answers: {answers}")
    first, *_ = took_ms.values()
    return {
        name: {
            "n": len(milliseconds),
            "p50_ms": round(statistics.median(milliseconds), 2),
            "p95_ms": round(statistics.quantiles(milliseconds, n=20)[-1], 2),
            "p50_above_vqa_ms": round(statistics.median(milliseconds) - statistics.median(first), 2),
            "paired_difference_p50_ms": round(
                statistics.median(mine - other for mine, other in zip(milliseconds, first, strict=True)), 2
            ),
        }
        for name, milliseconds in took_ms.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=count, default=600, help="questions to ask over every way")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder, gateway(REFERENCE, Path(folder), {"VISUAL_CACHE_BYTES": "0"}) as running:
        result = measure(running, arguments.questions)
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
