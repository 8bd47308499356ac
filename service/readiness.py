"""Tell whether the service can answer now: the last probe of every model, a real inference, succeeded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.metrics import Metrics

log = structlog.get_logger()


class Prober(Protocol):
    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        """Run an inference, unless the model answered a request within `fresh_s`. Raises Unavailable."""
        ...


class Readiness:
    """Hold the result of the last probe of each model."""

    def __init__(self, models: Sequence[str], metrics: Metrics) -> None:
        self.faults: dict[str, str] = dict.fromkeys(models, "not answered yet")
        self._metrics = metrics

    @property
    def ready(self) -> bool:
        return not any(self.faults.values())

    def set(self, model: str, fault: str, cause: str = "") -> None:
        """Record a probe; an empty fault is a success. The cause goes to the log only."""
        if self.faults[model] != fault:
            (log.warning if fault else log.info)("probe", model=model, fault=fault or "none", cause=cause)
        self.faults[model] = fault
        self._metrics.ready.set(self.ready)

    async def probe(self, prober: Prober, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None:
        """Probe all models once, concurrently."""

        async def one(model: str) -> None:
            try:
                await prober.probe(model, card, timeout_s, fresh_s)
            except GlimpseError as error:
                self.set(model, error.message, error.cause)
            else:
                self.set(model, "")

        async with asyncio.TaskGroup() as probes:
            for model in self.faults:
                probes.create_task(one(model))

    async def watch(self, prober: Prober, card: ModelCard, interval_s: float, timeout_s: float) -> None:
        """Probe idle models until cancelled, ten times as often while the service is not ready."""
        while True:
            await self.probe(prober, card, timeout_s, fresh_s=interval_s / 2)
            await asyncio.sleep(interval_s if self.ready else interval_s / 10)
