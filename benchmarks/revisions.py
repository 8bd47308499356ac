"""Two checkouts of Glimpse side by side, on the same machine and the same requests, in turn.

    git worktree add ../before COMMIT
    python -m benchmarks.revisions ../before --out build/bench/revisions.json

Both serve at once, and only one is asked at a time. A pair is one request to each about the same image, in changing
order, so that a slow moment of the machine hits both alike. For cold and follow-up latency with one client, follow-ups
a second with 8 clients, and the gateway's CPU time of a follow-up, it reports this checkout over the other one: the
median of the pairs' ratios with its 95 % interval (bootstrap).
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.arguments import count
from benchmarks.bench.models import PROJECT, REFERENCE
from benchmarks.bench.scenes import Scenes
from benchmarks.bench.systems import gateway
from benchmarks.figures import tell

CLIENTS = 8
HUNDRED = 100
WARM_UP = 10  # requests of each kind


@dataclass(frozen=True, slots=True)
class Gateway:
    """One checkout that serves."""

    port: int
    pid: int

    def ask(self, body: bytes) -> tuple[float, str]:
        """Seconds until the whole answer is there, and the id of its image. Raises RuntimeError if it is an error."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/vqa", body, {"content-type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        seconds = time.perf_counter() - started
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {said[:300]!r}")
        return seconds, json.loads(said)["image_ids"][0]

    def cpu_s(self) -> float:
        """Of the gateway's process alone."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(checkout: Path) -> Iterator[Gateway]:
    """That checkout's gateway and its own model repository. Raises RuntimeError."""
    settings = {"MODEL_REPOSITORY": str(checkout / "model_repository"), "ELASTIC_FIDELITY": "false"}
    with TemporaryDirectory() as logs, gateway(REFERENCE, Path(logs), settings, checkout=checkout) as running:
        yield Gateway(int(running.urls[0].rpartition(":")[2]), running.pids[0])


@dataclass(frozen=True, slots=True)
class Side:
    """One checkout, and the bodies it is asked: the same for both."""

    gateway: Gateway
    ids: list[str]  # of the images sent so far; follow-ups name them


def in_pairs(sides: tuple[Side, Side], measure: Callable[[Side, int], float], count: int) -> dict[str, object]:
    """`measure` both sides `count` times in changing order. Median ratio of ours over theirs, with its interval."""
    found = []
    for number in range(count):
        order = sides if number % 2 == 0 else sides[::-1]
        figures = {id(side): measure(side, number) for side in order}
        found.append([figures[id(side)] for side in sides])
    ours, theirs = np.array(found).T
    ratios = ours / theirs
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "ours": round(float(np.median(ours)), 5),
        "theirs": round(float(np.median(theirs)), 5),
        "pairs": count,
    }


def compare(sides: tuple[Side, Side], count: int, blocks: int, block_requests: int) -> dict[str, object]:
    scenes = Scenes.load()

    def body(image: str, number: int) -> bytes:
        question = scenes.question(number % len(scenes.files), number)
        return json.dumps({"image": image, "question": question, "max_tokens": 8}).encode()

    def cold(side: Side, number: int) -> float:
        seconds, image_id = side.gateway.ask(body(base64.b64encode(scenes.jpeg(number)).decode(), number))
        side.ids.append(image_id)
        return seconds

    def follow_up(side: Side, number: int) -> float:
        return side.gateway.ask(body(side.ids[number % len(side.ids)], 1_000_000 + number))[0]

    def block(side: Side, number: int) -> float:
        """Follow-ups a second, with CLIENTS clients in a closed loop."""
        first = 2_000_000 + number * block_requests
        bodies = [body(side.ids[step % len(side.ids)], first + step) for step in range(block_requests)]
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(side.gateway.ask, bodies))
        return block_requests / (time.perf_counter() - started)

    def cpu(measure: Callable[[Side, int], float]) -> Callable[[Side, int], float]:
        """The gateway's CPU seconds of one, over HUNDRED of them: the kernel counts in hundredths."""

        def hundred(side: Side, number: int) -> float:
            before = side.gateway.cpu_s()
            for step in range(HUNDRED):
                measure(side, 10_000 + HUNDRED * number + step)
            return max(side.gateway.cpu_s() - before, 1e-3) / HUNDRED

        return hundred

    in_pairs(sides, cold, WARM_UP)
    in_pairs(sides, follow_up, WARM_UP)
    return {
        "cold_latency_s": in_pairs(sides, lambda side, number: cold(side, WARM_UP + number), count),
        "follow_up_latency_s": in_pairs(sides, lambda side, number: follow_up(side, WARM_UP + number), count),
        "follow_ups_per_s": in_pairs(sides, block, blocks),
        "gateway_cpu_s_follow_up": in_pairs(sides, cpu(follow_up), blocks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=count, default=200, help="requests to each, cold and follow-up [200]")
    parser.add_argument("--blocks", type=count, default=20, help="of follow-ups with 8 clients, for each checkout [20]")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    told = parser.parse_args()
    with ExitStack() as both:
        ours, theirs = (both.enter_context(serving(checkout)) for checkout in (PROJECT, told.before.resolve()))
        result = compare((Side(ours, []), Side(theirs, [])), told.pairs, told.blocks, block_requests=200)
    tell({"cpu": cpu_model(), **result}, told.out)


def cpu_model() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(': ')[2]}, {len(names)} cores" if names else "unknown"


if __name__ == "__main__":
    main()
