"""Measure latency and throughput of the whole service on this machine.

    python -m benchmarks.latency          # starts its own server, measures, stops it

One client measures end-to-end latency: cold (a new image) and follow-up (another question about it). Then 1, 8 and 32
clients in turn measure requests and tokens per second over several rounds, for whole and for streamed answers. The
report also has the time to ready and the memory of all processes. The cache of visual tokens is off: the clients ask
the same question about each of 32 images again and again, and would measure that cache. The LLM may still reuse a
prefix.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from PIL import Image

from benchmarks.arguments import count
from benchmarks.bench.models import REFERENCE
from benchmarks.bench.processes import proportional_bytes
from benchmarks.bench.summary import latencies
from benchmarks.bench.systems import Running, gateway
from benchmarks.figures import tell
from build_engines.evaluation.accuracy import SCENES, rows

PREFIX = "GLIMPSE_"
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
ROUNDS = 5  # of the concurrency measurement; they alternate, so that a slow minute affects all client counts equally


@dataclass(frozen=True)
class Server:
    running: Running
    ready_s: float

    @property
    def url(self) -> str:
        return self.running.urls[0]

    def memory_mb(self) -> float:
        """Memory of all its processes (PSS): each shared page counts once."""
        return sum(map(proportional_bytes, self.running.processes())) / 1e6


@contextmanager
def own_server(**settings: str) -> Iterator[Server]:
    """Run `glimpse serve` on free ports, and stop it at the end. Raises RuntimeError if it does not start.

    Its settings are these, and the others of the environment's GLIMPSE_ variables.
    """
    told = {name.removeprefix(PREFIX): value for name, value in os.environ.items() if name.startswith(PREFIX)}
    started = time.monotonic()
    with TemporaryDirectory() as folder, gateway(REFERENCE, Path(folder), told | settings) as running:
        yield Server(running, time.monotonic() - started)


def never_seen(scene: Path, step: int) -> str:
    """Return the scene shifted sideways by some pixels, as base64: a similar image with other bytes."""
    with Image.open(scene) as image:
        pixels = np.roll(np.asarray(image.convert("RGB")), step % 200 + 1, axis=1)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "WEBP", quality=90)
    return base64.b64encode(encoded.getvalue()).decode()


def ask(client: httpx.Client, image: str, question: str, max_tokens: int) -> tuple[dict, float]:
    """Return the answer and its end-to-end time in milliseconds. Raises httpx.HTTPError."""
    started = time.perf_counter()
    response = client.post("/v1/vqa", json={"image": image, "question": question, "max_tokens": max_tokens})
    response.raise_for_status()
    return response.json(), (time.perf_counter() - started) * 1e3


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    """Return percentiles; too few values have no p95 or no p99."""
    found = latencies(each / 1e3 for each in milliseconds) or {}
    return {"n": len(milliseconds), **{f"{name}_ms": round(found[name], 1) for name in found if name.startswith("p")}}


def one_client(url: str, count: int) -> dict[str, dict[str, float]]:
    """Measure cold and follow-up latency of short questions, one request at a time."""
    asked = [row for row in rows(SCENES) if row.type != "describe"]
    cold, follow_up = [], []
    with httpx.Client(base_url=url, timeout=60) as client:
        for step in range(count + 10):
            row, other = asked[step * 7 % len(asked)], asked[(step * 7 + 3) % len(asked)]
            image = never_seen(SCENES / row.image, step)
            first, cold_ms = ask(client, image, row.question, 8)
            second, follow_up_ms = ask(client, image, other.question, 8)
            if (first["vision"]["cache"], second["vision"]["cache"]) != ("miss", "hit"):
                raise RuntimeError(f"expected a miss, then a hit: {first['vision']}, {second['vision']}")
            if step >= 10:  # the first ones warm up
                cold.append(cold_ms)
                follow_up.append(follow_up_ms)
    return {"cold": percentiles(cold), "follow_up": percentiles(follow_up)}


def many_clients(url: str, clients: int, requests: int, stream: bool = False) -> dict[str, float]:
    """Measure a closed loop of long answers (`describe the image.`) about images sent before. Any error raises.

    Each client has one http.client connection: the load shares the machine with the service, so it must cost little.
    """
    scenes = [SCENES / name for name in sorted({row.image for row in rows(SCENES)})[:32]]
    with httpx.Client(base_url=url, timeout=60) as client:
        sent = [client.post("/v1/images", content=scene.read_bytes()).raise_for_status() for scene in scenes]
    bodies = [
        json.dumps({"image": response.json()["id"], "question": "describe the image.", "stream": stream})
        for response in sent
    ]

    def describe(first: int) -> int:
        """Send every `clients`-th request, one after the other -> total tokens of the answers."""
        connection, tokens = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60), 0
        for step in range(first, requests, clients):
            connection.request("POST", "/v1/vqa", bodies[step % len(bodies)], {"content-type": "application/json"})
            response = connection.getresponse()
            said = response.read()
            if response.status != 200 or b'"error"' in said:
                raise RuntimeError(f"{response.status}: {said!r}")
            tokens += int(COMPLETION_TOKENS.search(said)[1])  # in the answer, or in a stream's last event
        connection.close()
        return tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(describe, range(clients)))
    elapsed_s = time.perf_counter() - started
    return {"requests_per_s": requests / elapsed_s, "tokens_per_s": tokens / elapsed_s}


def measure(server: Server, count: int) -> dict[str, object]:
    result: dict[str, object] = {"ready_s": round(server.ready_s, 1), "one_client": one_client(server.url, count)}
    many_clients(server.url, 8, 32)  # fills the cache
    for name, stream in (("whole_answers", False), ("streamed_answers", True)):
        series: dict[int, list[dict[str, float]]] = {1: [], 8: [], 32: []}
        for _ in range(ROUNDS):
            for clients, seen in series.items():
                seen.append(many_clients(server.url, clients, max(48, 6 * clients), stream))
        medians = {
            clients: {key: round(statistics.median(each[key] for each in seen), 1) for key in seen[0]}
            for clients, seen in series.items()
        }
        ratio = medians[8]["tokens_per_s"] / medians[1]["tokens_per_s"]
        result[name] = {"clients": medians, "tokens_per_s_8_over_1": round(ratio, 2)}
    result["memory_mb"] = round(server.memory_mb())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=count, default=200, help="cold questions to ask with one client")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with own_server(VISUAL_CACHE_BYTES="0") as server:
        result = measure(server, arguments.requests)
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
