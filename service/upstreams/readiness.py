"""Whether the service can answer now: the last probe of every model succeeded, and so do real requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import structlog

from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.telemetry.metrics import Metrics

log = structlog.get_logger()

GATEWAY = "gateway"  # beside the models' names
BROKEN = "its probe failed: see the gateway's log"
LOOKS = 10  # at what real requests find, between two probes


class Prober(Protocol):
    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        """Run an inference, unless the model answered a request within `fresh_s`. Raises Unavailable."""
        ...


def none_fails(_: str) -> bool:
    return False


class Readiness:
    """The result of the last probe of each model, and what real requests have found since."""

    def __init__(self, models: Sequence[str], metrics: Metrics, failing: Callable[[str], bool] = none_fails) -> None:
        """`failing` says of a model whether requests find that it does not answer."""
        self._probed: dict[str, str] = dict.fromkeys(models, "not answered yet")
        self._failing = failing
        self._stopping = False
        metrics.ready.set_function(lambda: self.ready)
        for model in self._probed:
            metrics.model_ready.labels(model).set_function(partial(self._answers, model))

    @property
    def faults(self) -> Mapping[str, str]:
        """By model, why it does not answer; empty if the service is ready."""
        faults = {model: fault or self._seen(model) for model, fault in self._probed.items()}
        if self._stopping:
            faults[GATEWAY] = "this server is stopping"
        return {name: fault for name, fault in faults.items() if fault}

    @property
    def degraded(self) -> Mapping[str, str]:
        """Nothing: a service with a Triton of its own is ready, or it is not."""
        return {}

    @property
    def ready(self) -> bool:
        return not self.faults

    def stop(self) -> None:
        """Be not ready from now on."""
        self._stopping = True

    def set(self, model: str, fault: str, cause: str = "") -> None:
        """Record a probe; an empty fault is a success. The cause goes to the log only."""
        if self._probed[model] != fault:
            (log.warning if fault else log.info)("probe", model=model, fault=fault or "none", cause=cause)
        self._probed[model] = fault

    async def probe(self, prober: Prober, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None:
        """Probe all models once, concurrently."""

        async def one(model: str) -> None:
            try:
                await prober.probe(model, card, timeout_s, fresh_s)
            except GlimpseError as error:
                self.set(model, error.message, error.cause)
            except Exception as error:  # a fault of our own must not end the watch, and with it the service
                if self._probed[model] != BROKEN:
                    log.exception("probe_crashed", model=model)
                self.set(model, BROKEN, repr(error))
            else:
                self.set(model, "")

        async with asyncio.TaskGroup() as probes:
            for model in self._probed:
                probes.create_task(one(model))

    async def watch(self, prober: Prober, card: ModelCard, interval_s: float, timeout_s: float) -> None:
        """Probe idle models until cancelled, ten times as often while the service is not ready."""
        while True:
            await self.probe(prober, card, timeout_s, fresh_s=interval_s / 2)
            for _ in range(LOOKS):
                await asyncio.sleep(interval_s / LOOKS)
                if not self.ready:
                    break

    def _answers(self, model: str) -> bool:
        return not (self._probed[model] or self._seen(model))

    def _seen(self, model: str) -> str:
        return f"requests to the model {model} fail" if self._failing(model) else ""
