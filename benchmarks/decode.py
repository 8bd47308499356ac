"""What one decode step costs inside the `llm` model, and how much of it is ours: no Triton, no network.

    python -m benchmarks.decode [--repository model_repository]

For each batch size: the first token (prefill of one prompt of 45 tokens, 32 of them visual), a decode step, the part
of the step outside ONNX Runtime, and tokens a second. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core import Prompt, Sampling
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.decoder import OnnxDecoder

VISUAL, TEXT, STEPS = 32, 13, 100
WAYS = {"greedy": Sampling(STEPS), "sampled": Sampling(STEPS, temperature=0.8, top_k=20, top_p=0.9, seed=1)}


class TimedDecoder(OnnxDecoder):
    """Counts the seconds spent in ONNX Runtime."""

    inside_s = 0.0

    def _infer(self, *arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        started = time.perf_counter()
        found = super()._infer(*arrays)
        self.inside_s += time.perf_counter() - started
        return found


def measure(decoder: TimedDecoder, rows: int, sampling: Sampling) -> tuple[float, float, float]:
    """Seconds of one prefill of one prompt, of one step of `rows` rows, and of that step outside ONNX Runtime."""
    generator = np.random.default_rng(0)
    batcher = Batcher(decoder, Limits(max_prefill_tokens=1))  # one prompt a prefill
    for _ in range(rows):
        ids = [decoder.vocab_size + np.arange(VISUAL), generator.integers(3, decoder.vocab_size, TEXT)]
        table = generator.normal(size=(VISUAL, decoder.hidden_size)).astype(np.float32)
        prompt = Prompt(np.concatenate(ids).astype(np.int32), table, np.zeros(VISUAL + TEXT, np.uint64))
        batcher.submit(Sequence("", prompt, sampling, end_id=-1))
    prefills, steps, outside = [], [], []
    while batcher.running or batcher.waiting:
        waiting, running, decoder.inside_s = batcher.waiting, batcher.running, 0.0
        started = time.perf_counter()
        batcher.iterate()
        took = time.perf_counter() - started
        if batcher.waiting < waiting:
            prefills.append(took)
        elif running == rows:
            steps.append(took)
            outside.append(took - decoder.inside_s)
    return statistics.median(prefills), statistics.median(steps), statistics.median(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    graph = parser.parse_args().repository / "llm" / "1" / "model.onnx"
    print("rows  way      prefill ms  step ms  outside ms  tokens/s")
    for rows in (1, 8, 32):
        for way, sampling in WAYS.items():
            prefill, step, outside = measure(TimedDecoder(graph, max_rows=rows), rows, sampling)
            figures = f"{prefill * 1e3:10.2f} {step * 1e3:8.2f} {outside * 1e3:11.3f} {rows / step:9.0f}"
            print(f"{rows:4}  {way:8} {figures}")


if __name__ == "__main__":
    main()
