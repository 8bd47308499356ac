"""What the batcher does, in Triton's own metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_models.batcher import Batcher
from triton_models.prefix_cache import PrefixCache

PERIOD_S = 1.0  # every change told is a message to Triton's process: not once a token


@dataclass(slots=True)
class Gauge:
    """One series: what Triton was told last, and where to read what is so now."""

    tell: Callable[[float], None]
    read: Callable[[], int]
    counts: bool  # a counter is told the difference
    told: int = 0

    def update(self) -> None:
        now = self.read()
        if now != self.told:
            self.tell(now - self.told if self.counts else now)
            self.told = now


class Gauges:
    """Batch, queue, work done and what the prefix cache saved, once a second.

    Tokens over iterations is the mean batch size.
    """

    def __init__(self, batcher: Batcher, prefixes: PrefixCache) -> None:
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        sequences = _family("glimpse_llm_sequences", "Sequences in the running batch and in the queue", gauge)
        tokens = _family("glimpse_llm_tokens_total", "Tokens generated", counter)
        iterations = _family("glimpse_llm_iterations_total", "Runs of the decoder: a prefill or a step each", counter)
        hits = _family("glimpse_llm_prefix_hits_total", "Prompts whose first tokens were not read again", counter)
        reused = _family("glimpse_llm_prefix_tokens_total", "Prompt tokens that were not read again", counter)
        kept = _family("glimpse_llm_prefix_bytes", "Keys and values of recent prompts, kept for reuse", gauge)
        self._families: tuple[Any, ...] = (
            sequences,
            tokens,
            iterations,
            hits,
            reused,
            kept,
        )  # Triton wants a family to outlive its metrics
        self._gauges: tuple[Gauge, ...] = (
            Gauge(sequences.Metric(labels={"state": "running"}).set, lambda: batcher.running, counts=False),
            Gauge(sequences.Metric(labels={"state": "waiting"}).set, lambda: batcher.waiting, counts=False),
            Gauge(tokens.Metric(labels={}).increment, lambda: batcher.tokens, counts=True),
            Gauge(iterations.Metric(labels={}).increment, lambda: batcher.iterations, counts=True),
            Gauge(hits.Metric(labels={}).increment, lambda: batcher.prefix_hits, counts=True),
            Gauge(reused.Metric(labels={}).increment, lambda: batcher.prefix_tokens, counts=True),
            Gauge(kept.Metric(labels={}).set, lambda: prefixes.nbytes, counts=False),
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-gauges", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tells the last figures and lets go of the metrics: once the interpreter ends they would have nobody to tell
        of their end, and the process would die of a segmentation fault."""
        self._ended.set()
        self._thread.join()
        self._update()
        self._gauges = ()
        self._families = ()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._update()

    def _update(self) -> None:
        for gauge in self._gauges:
            gauge.update()


def _family(name: str, description: str, kind: Any) -> Any:
    return pb_utils.MetricFamily(name=name, description=description, kind=kind)
