"""Report the batcher's work through Triton's own metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from triton_models.batcher import Batcher
from triton_models.metrics import counter_family, gauge_family, metric_of
from triton_models.prefix_cache import PrefixCache

PERIOD_S = 1.0  # each update is a message to Triton's process, which is too expensive per token


@dataclass(slots=True)
class Gauge:
    """One metric series: the last value sent to Triton and how to read the current one."""

    tell: Callable[[float], None]
    read: Callable[[], int]
    counts: bool  # a counter: send the difference
    told: int = 0
    is_known: bool = False  # a series keeps the value of a process that died

    def update(self) -> None:
        now = self.read()
        if now != self.told or not (self.counts or self.is_known):
            self.tell(now - self.told if self.counts else now)
            self.told, self.is_known = now, True


class Gauges:
    """Update the LLM's metrics once a second: batch, queue, work done, prefix cache.

    Tokens divided by iterations is the mean batch size.
    """

    def __init__(self, batcher: Batcher, prefixes: PrefixCache) -> None:
        sequences = gauge_family("glimpse_llm_sequences", "Sequences in the running batch and in the queue")
        tokens = counter_family("glimpse_llm_tokens_total", "Tokens generated")
        iterations = counter_family("glimpse_llm_iterations_total", "Decoder runs: each a prefill or a step")
        hits = counter_family("glimpse_llm_prefix_hits_total", "Prompts whose first tokens were in the prefix cache")
        reused = counter_family("glimpse_llm_prefix_tokens_total", "Prompt tokens that the prefix cache saved")
        kept = gauge_family("glimpse_llm_prefix_bytes", "Bytes of keys and values in the prefix cache")
        self._gauges: tuple[Gauge, ...] = (
            Gauge(metric_of(sequences, {"state": "running"}).set, lambda: batcher.running, counts=False),
            Gauge(metric_of(sequences, {"state": "waiting"}).set, lambda: batcher.waiting, counts=False),
            Gauge(metric_of(tokens, {}).increment, lambda: batcher.tokens, counts=True),
            Gauge(metric_of(iterations, {}).increment, lambda: batcher.iterations, counts=True),
            Gauge(metric_of(hits, {}).increment, lambda: batcher.prefix_hits, counts=True),
            Gauge(metric_of(reused, {}).increment, lambda: batcher.prefix_tokens, counts=True),
            Gauge(metric_of(kept, {}).set, lambda: prefixes.nbytes, counts=False),
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-gauges", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last values."""
        self._ended.set()
        self._thread.join()
        self._update()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._update()

    def _update(self) -> None:
        for gauge in self._gauges:
            gauge.update()
