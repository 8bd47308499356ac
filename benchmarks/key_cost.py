"""Measure what a key costs a follow-up: two gateways in front of one Triton, one with keys and one without.

    python -m benchmarks.key_cost          # starts its own servers

One client asks each question about an image that both gateways know, at both in random order, over connections that
are kept. The cache of visual tokens is off. `off again` is a second connection to the gateway without keys: its
difference is the noise.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from benchmarks.arguments import count
from benchmarks.bench.models import REFERENCE
from benchmarks.bench.systems import gateway
from benchmarks.figures import tell
from benchmarks.guesses import make_keys
from benchmarks.ports import free_ports
from build_engines.evaluation.accuracy import SCENES

QUESTIONS = ("how many objects are there?", "is there a red circle?", "what colour is the cross?")
WARM_UP = 30


class Asker:
    """One connection to a gateway, with a key or none."""

    def __init__(self, url: str, key: str = "") -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self.images = [json.loads(self._post("/v1/images", (SCENES / name).read_bytes()))["id"] for name in scenes()]
        for image in self.images:
            self.ask(image, QUESTIONS[0])

    def ask(self, image: str, question: str) -> float:
        """Return the milliseconds of an answer."""
        body = json.dumps({"image": image, "question": question, "max_tokens": 1}).encode()
        started = time.perf_counter()
        self._post("/v1/vqa", body, "application/json")
        return (time.perf_counter() - started) * 1e3

    def _post(self, path: str, body: bytes, kind: str = "image/webp") -> bytes:
        self._connection.request("POST", path, body, self._headers | {"content-type": kind})
        response = self._connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise RuntimeError(f"POST {path} gave {response.status}: {said!r}")
        return said


def scenes() -> list[str]:
    return sorted(path.name for path in SCENES.glob("*.webp"))[:8]


def measure(askers: dict[str, Asker], count: int) -> dict[str, dict[str, float]]:
    took_ms: dict[str, list[float]] = {name: [] for name in askers}
    for step in range(WARM_UP + count):
        for name in random.sample([*askers], len(askers)):
            asker = askers[name]
            milliseconds = asker.ask(asker.images[step % len(asker.images)], QUESTIONS[step % len(QUESTIONS)])
            if step >= WARM_UP:
                took_ms[name].append(milliseconds)
    first = took_ms["off"]
    return {
        name: {
            "n": len(times),
            "p50_ms": round(statistics.median(times), 3),
            "paired_difference_p50_ms": round(
                statistics.median(mine - other for mine, other in zip(times, first, strict=True)), 3
            ),
        }
        for name, times in took_ms.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=count, default=1_000)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name, ExitStack() as open_gateways:
        folder = Path(name)
        key, _ = make_keys(folder / "keys.json")
        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        url = {"VISION_URL": address, "LLM_URL": address, "VISUAL_CACHE_BYTES": "0"}
        running = {}
        for which, settings in {
            "triton": {"TRITON_GRPC_PORT": str(port)},
            "off": url,
            "on": url | {"KEYS": str(folder / "keys.json")},
        }.items():
            (folder / which).mkdir()
            running[which] = open_gateways.enter_context(gateway(REFERENCE, folder / which, settings)).urls[0]
        askers = {"off": Asker(running["off"]), "off again": Asker(running["off"]), "on": Asker(running["on"], key)}
        figures = measure(askers, arguments.questions)
    tell(figures, arguments.out)


if __name__ == "__main__":
    main()
