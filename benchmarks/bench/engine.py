"""Measure the bare engine limit: the ONNX graphs alone, in one process on all cores.

    python -m benchmarks.bench.engine REPOSITORY MAX_TOKENS '{"follow_up": [VISION_TOKENS, TEXT_TOKENS], ...}'

It prints JSON. Each graph runs at every batch size in two ways: one run on all cores, and parallel runs on one core
each. The best rate counts. A request's time is the sum over its graphs, on inputs as long as the workload's average.
No server can be faster for the same work.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from service.core.card import ModelCard
from triton_models.session import open_session

BATCHES = (1, 2, 4, 8, 16)  # 16 clients never fill a larger batch
MOST_IMAGES = 8  # in one run of the encoder
MEASURED_S, LEAST_RUNS = 1.0, 3
VISUAL_TOKENS = 32  # per request of the benchmark
STAGES = {
    "vision_encoder": "vision_encoder",
    "relevance_allocator": "relevance_allocator",
    "qformer": "qformer",
    "prefill": "llm",
    "step": "llm",
}  # each stage is one way to run a graph
Feeds = Mapping[str, npt.NDArray[Any]]


class Work(NamedTuple):
    """What one request reads, besides its visual tokens."""

    vision_tokens: int  # without CLS
    text_tokens: int


def limit(repository: Path, max_tokens: int, cores: int, works: Mapping[str, Work]) -> dict[str, Any]:
    """Return requests/s by workload (`cold`, `follow_up`), and each graph's best time per request."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    stages: dict[str, dict[str, Any]] = {workload: {} for workload in works}
    for stage, graph in STAGES.items():
        ways = {threads: open_session(repository / graph / "1" / "model.onnx", threads) for threads in {1, cores}}
        needed = {workload: work for workload, work in works.items() if stage != "vision_encoder" or workload == "cold"}
        for work in set(needed.values()):
            best = min(
                (
                    fastest(session, feeds(stage, batch, session, card, work), batch, threads, cores // threads)
                    for threads, session in ways.items()
                    for batch in BATCHES
                    if stage != "vision_encoder" or batch <= MOST_IMAGES
                ),
                key=lambda found: found["ms_a_row"],
            )
            for workload in [workload for workload, its in needed.items() if its == work]:
                stages[workload][stage] = best
    return {
        "cores": cores,
        "answer_tokens": max_tokens,
        "work": {workload: work._asdict() for workload, work in works.items()},
        "stages": stages,
        "requests_per_s": {
            workload: 1e3
            / sum(found["ms_a_row"] * (max_tokens - 1 if stage == "step" else 1) for stage, found in each.items())
            for workload, each in stages.items()
        },
    }


def fastest(
    session: onnxruntime.InferenceSession, feed: Feeds, batch: int, threads: int, at_once: int
) -> dict[str, Any]:
    """Return the median of runs, with `at_once` of them in parallel."""
    run: Callable[[int], Any] = lambda _: session.run(None, dict(feed))  # noqa: E731
    took: list[float] = []
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, range(at_once)))
        begun = time.perf_counter()
        while len(took) < LEAST_RUNS or time.perf_counter() - begun < MEASURED_S:
            started = time.perf_counter()
            list(pool.map(run, range(at_once)))
            took.append(time.perf_counter() - started)
    rows = batch * at_once
    return {"ms_a_row": float(np.median(took)) * 1e3 / rows, "batch": batch, "threads": threads, "at_once": at_once}


def feeds(stage: str, batch: int, session: onnxruntime.InferenceSession, card: ModelCard, work: Work) -> Feeds:
    """Make inputs of the work's size from the graph's own shapes; inputs not listed here are noise of their type."""
    random = np.random.default_rng(0)
    read = 1 + work.vision_tokens
    sizes = {"batch": batch, "vision_tokens": read}
    text = VISUAL_TOKENS + work.text_tokens if stage == "prefill" else 1
    past = 0 if stage == "prefill" else VISUAL_TOKENS + work.text_tokens + 8
    sizes |= {"length": text, "visual_tokens": VISUAL_TOKENS if stage == "prefill" else 1, "past_length": past}
    said: dict[str, npt.NDArray[Any]] = {
        "budget": np.array([[64, 256, 32, 32]] * batch),
        "attend": np.ones((batch, read)),
        "question_mask": np.ones((batch, 32)),
        "input_lengths": np.full(batch, text),
        "past_lengths": np.full(batch, past),
    }
    if stage == "prefill":
        ids = np.r_[card.vocab_size + np.arange(VISUAL_TOKENS), random.integers(5, card.vocab_size, work.text_tokens)]
        said["input_ids"] = np.tile(ids, (batch, 1))
    found: dict[str, npt.NDArray[Any]] = {}
    for spec in session.get_inputs():
        shape = [sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape]
        dtype = {"tensor(uint8)": np.uint8, "tensor(int32)": np.int32, "tensor(int64)": np.int64}.get(spec.type)
        noise = random.integers(5, 200, shape) if dtype else random.standard_normal(shape) * 0.1
        found[spec.name] = said.get(spec.name, noise).astype(dtype or np.float32)
    return found


def main() -> None:
    repository, max_tokens = Path(sys.argv[1]), int(sys.argv[2])
    works = {workload: Work(*work) for workload, work in json.loads(sys.argv[3]).items()}
    sys.stdout.write(json.dumps(limit(repository, max_tokens, len(os.sched_getaffinity(0)), works)) + "\n")


if __name__ == "__main__":
    main()
