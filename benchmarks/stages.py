"""Measure each served model's compute time from Triton's metrics.

    python -m benchmarks.stages [--clients 4] [--detail high] [--graphs model_repository] [--out FILE]

It needs a running `glimpse serve`. It asks about new images in rounds, one question at a time per client, and reads
Triton's metrics around each round. A model's time is its compute time per request, without queue and transport; for
the decoupled `llm` it is only the time of accepting a request. The report has medians over the rounds with 95 %
intervals. The allocator should take at most a tenth of the encoder's time.

`--graphs` names the served repository. The report then also has `graph_ms`: the time of one row in each vision model's
graph alone, repeated on one thread of this process after the load. The rest of a model's time is the cost of serving.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.arguments import count
from benchmarks.bench.engine import Work, fastest, feeds
from benchmarks.figures import tell
from build_engines.evaluation.accuracy import NOT_IN_TOTAL, SCENES, rows
from build_engines.evaluation.intervals import median
from service.core.card import ModelCard
from triton_models.session import open_session

ENCODER, ALLOCATOR = "vision_encoder", "relevance_allocator"
USUAL = Work(vision_tokens=100, text_tokens=13)  # a typical question of the reference model
GRAPHS = (ENCODER, ALLOCATOR, "qformer")  # models that a new image needs before the LLM
MOST_SHARE = 0.1  # largest allowed allocator time, as a share of the encoder's

Counters = Mapping[str, tuple[int, float]]  # by model: requests, milliseconds computed


def counters(triton: httpx.Client) -> Counters:
    """Read the counters since Triton started, of models that compute themselves. Raises httpx.HTTPError."""
    told = triton.get("/metrics").raise_for_status().text
    answered, computed_us = (
        {model: float(value) for model, value in re.findall(rf'^{name}{{model="(\w+)".*}} (\S+)$', told, re.MULTILINE)}
        for name in ("nv_inference_request_success", "nv_inference_compute_infer_duration_us")
    )
    return {model: (int(answered[model]), us / 1e3) for model, us in computed_us.items() if us > 0}


def between(before: Counters, after: Counters, least: int) -> Counters:
    """Return the requests and milliseconds between two readings.

    Models with fewer than `least` requests are left out: those requests are the gateway's probes, which infer every
    model every few seconds.
    """
    spent = {}
    for name, (requests, milliseconds) in after.items():
        earlier, earlier_ms = before.get(name, (0, 0.0))
        if requests - earlier >= least:
            spent[name] = requests - earlier, milliseconds - earlier_ms
    return spent


def never_seen(scene: Path) -> str:
    """Return the scene as base64 with new bytes: 16 random bytes are in its metadata, which decoders skip."""
    encoded = io.BytesIO()
    with Image.open(scene) as image:
        image.convert("RGB").save(encoded, "WEBP", quality=90, xmp=os.urandom(16))
    return base64.b64encode(encoded.getvalue()).decode()


def ask(gateway: httpx.Client, image: str, question: str, detail: str) -> None:
    """Ask one question. Raises httpx.HTTPError, and RuntimeError if a cache had the image."""
    body = {"image": image, "question": question, "max_tokens": 8, "detail": detail}
    said = gateway.post("/v1/vqa", json=body).raise_for_status().json()
    if said["vision"]["cache"] != "miss":
        raise RuntimeError(f"a cache had the image already: {said['vision']}")


def summary(spent: list[Counters]) -> dict[str, object]:
    """Return each model's milliseconds per request, and the allocator's time as a share of the encoder's.

    Raises ValueError if the rounds used different models.
    """
    models = sorted(set().union(*spent))
    if not all(set(models) == set(each) for each in spent):
        raise ValueError("the rounds used different models: check that nobody else uses this server")
    a_request = {name: median([each[name][1] / each[name][0] for each in spent]).as_json(3) for name in models}
    allocators = [name for name in models if name.startswith(ALLOCATOR)]
    share = median([sum(each[name][1] for name in allocators) / each[ENCODER][1] for each in spent])
    return {
        "compute_ms": a_request,
        "allocator_over_encoder": share.as_json(),
        "bar": MOST_SHARE,
        "met": share.value <= MOST_SHARE,
    }


def measure(url: str, triton_url: str, clients: int, rounds: int, requests: int, detail: str) -> dict[str, object]:
    """Run all rounds -> the report. Raises httpx.HTTPError."""
    asked = [row for row in rows(SCENES, "new") if row.type != NOT_IN_TOTAL]
    spent: list[Counters] = []
    with (
        httpx.Client(base_url=url, timeout=60) as gateway,
        httpx.Client(base_url=triton_url, timeout=10) as triton,
        ThreadPoolExecutor(clients) as pool,
    ):
        for each in range(rounds + 1):
            drawn = [asked[step * 7 % len(asked)] for step in range(each * requests, (each + 1) * requests)]
            images = [never_seen(SCENES / row.image) for row in drawn]
            before = counters(triton)
            questions = (row.question for row in drawn)
            list(pool.map(ask, repeat(gateway), images, questions, repeat(detail)))
            spent.append(between(before, counters(triton), requests))
    told = {"clients": clients, "detail": detail, "rounds": rounds, "requests_a_round": requests}
    return told | summary(spent[1:])  # the first one warms up


def graph_ms(repository: Path) -> dict[str, float]:
    """Return each vision model's graph time for one row on one thread: medians of a second of runs, in ms."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    took = {}
    for name in GRAPHS:
        session = open_session(repository / name / "1" / "model.onnx")
        took[name] = round(
            fastest(session, feeds(name, 1, session, card, USUAL), 1, threads=1, at_once=1)["ms_a_row"], 3
        )
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway's URL (default: %(default)s)")
    parser.add_argument(
        "--triton", default="http://127.0.0.1:8002", help="URL of Triton's metrics (default: %(default)s)"
    )
    parser.add_argument("--clients", type=count, default=1, help="concurrent clients (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=20)
    parser.add_argument("--requests", type=count, default=25, help="requests per round (default: %(default)s)")
    parser.add_argument("--detail", choices=("low", "high"), default="low")
    parser.add_argument(
        "--graphs", type=Path, metavar="REPOSITORY", help="also time the vision models' graphs of this repository alone"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    result = measure(
        arguments.url, arguments.triton, arguments.clients, arguments.rounds, arguments.requests, arguments.detail
    )
    if arguments.graphs:
        result["graph_ms"] = graph_ms(arguments.graphs)
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
