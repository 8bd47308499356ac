"""What each model of the served chain costs, from Triton's own statistics, against a running `glimpse serve`.

    python -m benchmarks.stages [--detail high] [--out benchmarks/results/stages.json]

Asks about images that were never seen, one at a time, in rounds, and reads Triton's statistics around each round: the
time a model computes, which leaves out its queue and the transport, over the requests that it served. Medians over the
rounds with their 95 % intervals. The allocator should take at most a tenth of the encoder's time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import httpx

from benchmarks.ablation.intervals import Figure, median
from benchmarks.evaluate import NOT_IN_TOTAL, SCENES, Row, rows
from benchmarks.latency import never_seen

ENCODER, ALLOCATOR = "vision_encoder", "relevance_allocator"
MOST_SHARE = 0.1  # of the encoder's time, for the allocator

Counters = Mapping[str, tuple[int, float]]  # by model: requests, milliseconds computed


def counters(triton: httpx.Client) -> Counters:
    """Since Triton started, of the models that compute: ensembles do not. Raises httpx.HTTPError."""
    told = triton.get("/v2/models/stats").raise_for_status().json()["model_stats"]
    read = {}
    for model in told:
        stats = model["inference_stats"]
        if int(stats["compute_infer"]["count"]) > 0:
            read[model["name"]] = int(stats["success"]["count"]), int(stats["compute_infer"]["ns"]) / 1e6
    return read


def between(before: Counters, after: Counters) -> dict[str, float]:
    """Milliseconds a request of each model that served one in between."""
    spent = {}
    for name, (requests, milliseconds) in after.items():
        earlier, earlier_ms = before.get(name, (0, 0.0))
        if requests > earlier:
            spent[name] = (milliseconds - earlier_ms) / (requests - earlier)
    return spent


def ask(gateway: httpx.Client, row: Row, step: int, detail: str) -> None:
    """One question on an image that no cache knows. Raises httpx.HTTPError, and RuntimeError where a cache knew it."""
    body: dict[str, object] = {"image": never_seen(SCENES / row.image, step), "question": row.question, "max_tokens": 8}
    if detail != "low":
        body["detail"] = detail
    said = gateway.post("/v1/vqa", json=body).raise_for_status().json()
    if said["vision"]["cache"] != "miss":
        raise RuntimeError(f"the image was known already: restart the server, or wait ({said['vision']})")


def summary(spent: list[dict[str, float]]) -> dict[str, object]:
    """The rounds' milliseconds by model, and the allocator's share of the encoder's time. Raises ValueError where a
    model was not asked in every round."""
    models = sorted(set().union(*spent))
    if not all(set(models) == set(each) for each in spent):
        raise ValueError("other models served in some rounds: is somebody else asking this server?")
    compute = {name: median([each[name] for each in spent]).as_json(3) for name in models}
    allocators = [name for name in models if name.startswith(ALLOCATOR)]
    shares = [sum(each[name] for name in allocators) / each[ENCODER] for each in spent]
    share: Figure = median(shares)
    return {
        "compute_ms": compute,
        "allocator_over_encoder": share.as_json(),
        "bar": MOST_SHARE,
        "met": share.value <= MOST_SHARE,
    }


def measure(url: str, triton_url: str, rounds: int, requests: int, detail: str) -> dict[str, object]:
    """Raises httpx.HTTPError."""
    asked = [row for row in rows(SCENES, "new") if row.type != NOT_IN_TOTAL]
    spent = []
    with httpx.Client(base_url=url, timeout=60) as gateway, httpx.Client(base_url=triton_url, timeout=10) as triton:
        for each in range(rounds + 1):
            before = counters(triton)
            for step in range(each * requests, (each + 1) * requests):
                ask(gateway, asked[step * 7 % len(asked)], step, detail)
            spent.append(between(before, counters(triton)))
    told = {"detail": detail, "rounds": rounds, "requests_a_round": requests}
    return told | summary(spent[1:])  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the gateway (default: %(default)s)")
    parser.add_argument("--triton", default="http://127.0.0.1:8000", help="its HTTP port (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=25, help="in each round (default: %(default)s)")
    parser.add_argument("--detail", choices=("low", "high"), default="low")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    result = measure(arguments.url, arguments.triton, arguments.rounds, arguments.requests, arguments.detail)
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
