"""Readiness is what probes and real requests find, at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

from structlog.testing import capture_logs

from service.core.card import ModelCard
from service.core.errors import Unavailable
from service.telemetry.metrics import Metrics
from service.upstreams.readiness import Readiness
from tests.support.fakes import CARD, FakeProber, until
from tests.support.samples import sample


async def probed(readiness: Readiness) -> None:
    await readiness.probe(FakeProber(), CARD, 1)


async def test_what_requests_find_counts_before_any_probe() -> None:
    failing: set[str] = set()
    metrics = Metrics()
    readiness = Readiness(["see", "llm"], metrics, failing.__contains__)
    await probed(readiness)
    assert readiness.ready
    failing.add("llm")
    assert not readiness.ready
    assert readiness.faults == {"llm": "requests to the model llm fail"}
    assert sample(metrics, "glimpse_ready") == 0
    failing.clear()
    assert readiness.ready
    assert sample(metrics, "glimpse_ready") == 1


async def test_a_probes_fault_is_told_rather_than_the_requests() -> None:
    readiness = Readiness(["llm"], Metrics(), lambda _: True)
    prober = FakeProber()
    prober.faults["llm"] = Unavailable("it is gone")
    await readiness.probe(prober, CARD, 1)
    assert readiness.faults == {"llm": "it is gone"}


async def test_a_service_that_stops_is_not_ready_whatever_its_models_say() -> None:
    readiness = Readiness(["llm"], Metrics())
    await probed(readiness)
    readiness.stop()
    await probed(readiness)
    assert readiness.faults == {"gateway": "this server is stopping"}


async def test_a_model_that_requests_find_dead_is_probed_soon() -> None:
    """Not after the whole interval: a tenth of it at the latest."""

    class Counting(FakeProber):
        def __init__(self) -> None:
            super().__init__()
            self.probes: Counter[str] = Counter()

        async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
            self.probes[model] += 1

    failing: set[str] = set()
    prober = Counting()
    readiness = Readiness(["llm"], Metrics(), failing.__contains__)
    watching = asyncio.create_task(readiness.watch(prober, CARD, interval_s=6.0, timeout_s=1))
    await until(lambda: prober.probes["llm"] == 1)
    failing.add("llm")
    begun = asyncio.get_running_loop().time()
    await until(lambda: prober.probes["llm"] > 1)
    assert asyncio.get_running_loop().time() - begun < 4.0
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


async def test_a_probe_with_a_fault_of_its_own_ends_no_watch() -> None:
    class Broken(FakeProber):
        def __init__(self) -> None:
            super().__init__()
            self.probes = 0

        async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
            self.probes += 1
            if self.probes < 4:
                raise KeyError("visual_count")

    prober, readiness = Broken(), Readiness(["llm"], Metrics())
    with capture_logs() as lines:
        watching = asyncio.create_task(readiness.watch(prober, CARD, interval_s=0.1, timeout_s=1))
        await until(lambda: prober.probes == 2)
        assert set(readiness.faults) == {"llm"}
        await until(lambda: readiness.ready)
    assert [line["event"] for line in lines].count("probe_crashed") == 1
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
