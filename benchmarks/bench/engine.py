"""The bare engine limit: the ONNX graphs in a loop, in one process on all cores, nothing around them.

    python -m benchmarks.bench.engine REPOSITORY MAX_TOKENS      # prints JSON

Each graph is run at every batch size, once with all cores a run and once with one core for each of as many runs at a
time; the best rate counts. A request's time is the sum over the graphs it needs: what no server in front can beat.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from service.core import ModelCard
from triton_models.session import open_session

BATCHES = (1, 2, 4, 8, 16)  # 16 clients bring no more
MOST_IMAGES = 8  # in one run of the encoder
MEASURED_S, LEAST_RUNS = 1.0, 3
VISION_TOKENS, VISUAL_TOKENS, TEXT_TOKENS = 101, 32, 14  # of a request of the benchmark
Feeds = Mapping[str, npt.NDArray[Any]]


def limit(repository: Path, max_tokens: int, cores: int) -> dict[str, Any]:
    """Requests/s of `cold` and `follow_up`, and what each graph takes of a request, at its best, in milliseconds."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    best: dict[str, dict[str, Any]] = {}
    for graph, stages in {
        "vision_encoder": ("vision_encoder",),
        "relevance_allocator": ("relevance_allocator",),
        "qformer": ("qformer",),
        "llm": ("prefill", "step"),
    }.items():
        ways = {threads: open_session(repository / graph / "1" / "model.onnx", threads) for threads in {1, cores}}
        for stage in stages:
            best[stage] = min(
                (
                    fastest(session, feeds(stage, batch, session, card), batch, threads, cores // threads)
                    for threads, session in ways.items()
                    for batch in BATCHES
                    if stage != "vision_encoder" or batch <= MOST_IMAGES
                ),
                key=lambda found: found["ms_a_row"],
            )
    times = {stage: found["ms_a_row"] for stage, found in best.items()}
    follow_up_ms = times["relevance_allocator"] + times["qformer"] + times["prefill"] + (max_tokens - 1) * times["step"]
    cold_ms = follow_up_ms + times["vision_encoder"]
    return {
        "cores": cores,
        "stages": best,
        "answer_tokens": max_tokens,
        "requests_per_s": {"follow_up": 1e3 / follow_up_ms, "cold": 1e3 / cold_ms},
    }


def fastest(
    session: onnxruntime.InferenceSession, feed: Feeds, batch: int, threads: int, at_once: int
) -> dict[str, Any]:
    """The median of runs, `at_once` of them at a time."""
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


def feeds(stage: str, batch: int, session: onnxruntime.InferenceSession, card: ModelCard) -> Feeds:
    """Inputs of a request's usual size, by the graph's own shapes: what is not said here is noise of its type."""
    random = np.random.default_rng(0)
    sizes = {"batch": batch, "vision_tokens": VISION_TOKENS}
    text = VISUAL_TOKENS + TEXT_TOKENS if stage == "prefill" else 1
    past = 0 if stage == "prefill" else VISUAL_TOKENS + TEXT_TOKENS + 8
    sizes |= {"length": text, "visual_tokens": VISUAL_TOKENS if stage == "prefill" else 1, "past_length": past}
    said: dict[str, npt.NDArray[Any]] = {
        "budget": np.array([[64, 256, 32, 32]] * batch),
        "attend": np.ones((batch, VISION_TOKENS)),
        "question_mask": np.ones((batch, 32)),
        "input_lengths": np.full(batch, text),
        "past_lengths": np.full(batch, past),
    }
    if stage == "prefill":
        ids = np.r_[card.vocab_size + np.arange(VISUAL_TOKENS), random.integers(5, card.vocab_size, TEXT_TOKENS)]
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
    sys.stdout.write(json.dumps(limit(repository, max_tokens, len(os.sched_getaffinity(0)))) + "\n")


if __name__ == "__main__":
    main()
