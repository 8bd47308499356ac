"""Measure a decode step of the `llm` model and its part outside ONNX Runtime.

    python -m benchmarks.decode [--repository model_repository] [--rows 1 8 32] [--threads 1]

There is no Triton and no network. For each batch size it prints medians of CPU milliseconds, which other processes'
load disturbs least: the first token (prefill of one prompt of 45 tokens, 32 of them visual), a decode step, and the
step's part outside ONNX Runtime. Tokens per second are wall-clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from service.core.prompt import Prompt
from service.core.request import Sampling
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.decoder import OnnxDecoder

VISUAL, TEXT, STEPS, ROUNDS = 32, 13, 64, 3
WAYS = {"greedy": Sampling(STEPS), "sampled": Sampling(STEPS, temperature=0.8, top_k=20, top_p=0.9, seed=1)}


class TimedSession:
    """Count the CPU seconds spent in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.io_binding = session.io_binding
        self.run = self._timed(session.run)
        self.run_with_iobinding = self._timed(session.run_with_iobinding)
        self.inside_s = 0.0

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            found = function(*arguments)
            self.inside_s += time.process_time() - started
            return found

        return timed


class TimedDecoder(OnnxDecoder):
    def __init__(self, graph: Path, *, max_rows: int, intra_op_threads: int = 1) -> None:
        super().__init__(graph, max_rows=max_rows, intra_op_threads=intra_op_threads)
        self._session: Any = TimedSession(self._session)

    @property
    def inside_s(self) -> float:
        return float(self._session.inside_s)


def prompt(decoder: OnnxDecoder, generator: np.random.Generator) -> Prompt:
    ids = [decoder.vocab_size + np.arange(VISUAL), generator.integers(3, decoder.vocab_size, TEXT)]
    table = generator.normal(size=(VISUAL, decoder.hidden_size)).astype(np.float32)
    return Prompt(np.concatenate(ids).astype(np.int32), table, np.zeros(VISUAL + TEXT, np.uint64))


def measure(decoder: TimedDecoder, rows: int, sampling: Sampling) -> tuple[float, float, float, float]:
    """Return median seconds of one prefill and of one step of `rows` rows.

    In order: CPU of the prefill of one prompt, CPU of the step, CPU of the step outside ONNX Runtime, and the step's
    wall-clock time.
    """
    generator = np.random.default_rng(0)
    prefills, steps, outside, took = [], [], [], []
    for _ in range(ROUNDS):
        batcher = Batcher(decoder, Limits(max_prefill_tokens=VISUAL + TEXT))  # one prompt per prefill
        for _ in range(rows):
            batcher.submit(Sequence("", prompt(decoder, generator), sampling, end_id=-1))
        while batcher.running or batcher.waiting:
            waiting, running, inside_s = batcher.waiting, batcher.running, decoder.inside_s
            started, started_cpu = time.perf_counter(), time.process_time()
            batcher.iterate()
            cpu_s = time.process_time() - started_cpu
            if batcher.waiting < waiting:
                prefills.append(cpu_s)
            elif running == rows:
                steps.append(cpu_s)
                outside.append(cpu_s - (decoder.inside_s - inside_s))
                took.append(time.perf_counter() - started)
    prefill, step, beside, elapsed = (statistics.median(each) for each in (prefills, steps, outside, took))
    return prefill, step, beside, elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1, help="threads of one step")
    given = parser.parse_args()
    graph = given.repository / "llm" / "1" / "model.onnx"
    print("rows  way      prefill CPU ms  step CPU ms  outside CPU ms  tokens/s")
    for rows in given.rows:
        for way, sampling in WAYS.items():
            decoder = TimedDecoder(graph, max_rows=rows, intra_op_threads=given.threads)
            prefill, step, outside, took = measure(decoder, rows, sampling)
            figures = f"{prefill * 1e3:14.2f} {step * 1e3:12.3f} {outside * 1e3:15.3f} {rows / took:9.0f}"
            print(f"{rows:4}  {way:8} {figures}")


if __name__ == "__main__":
    main()
