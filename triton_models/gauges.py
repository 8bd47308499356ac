"""Report the batcher's work through Triton's own metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_models.batcher import Batcher
from triton_models.prefix_cache import PrefixCache

PERIOD_S = 1.0  # each update is a message to Triton's process, which is too expensive per token


@dataclass(slots=True)
class Gauge:
    """One metric series: the last value sent to Triton and how to read the current one."""

    tell: Callable[[float], None]
    read: Callable[[], int]
    counts: bool  # a counter: send the difference
    told: int = 0

    def update(self) -> None:
        now = self.read()
        if now != self.told:
            self.tell(now - self.told if self.counts else now)
            self.told = now


class Gauges:
    """Update the LLM's metrics once a second: batch, queue, work done, prefix cache.

    Tokens divided by iterations is the mean batch size.
    """

    def __init__(self, batcher: Batcher, prefixes: PrefixCache) -> None:
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        sequences = _family("glimpse_llm_sequences", "Sequences in the running batch and in the queue", gauge)
        tokens = _family("glimpse_llm_tokens_total", "Tokens generated", counter)
        iterations = _family("glimpse_llm_iterations_total", "Decoder runs: each a prefill or a step", counter)
        hits = _family("glimpse_llm_prefix_hits_total", "Prompts whose first tokens were in the prefix cache", counter)
        reused = _family("glimpse_llm_prefix_tokens_total", "Prompt tokens that the prefix cache saved", counter)
        kept = _family("glimpse_llm_prefix_bytes", "Bytes of keys and values in the prefix cache", gauge)
        self._families: tuple[Any, ...] = (
            sequences,
            tokens,
            iterations,
            hits,
            reused,
            kept,
        )  # Triton requires a family to outlive its metrics
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
        """Send the last values and release the metrics.

        A metric that outlived the interpreter would crash the process with a segmentation fault when it is deleted.
        """
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
