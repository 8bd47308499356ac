"""Readiness is what probes and real requests find, at once."""

from __future__ import annotations

import asyncio
from collections import Counter

from structlog.testing import capture_logs

from service.core.card import ModelCard
from service.core.errors import Unavailable
from service.telemetry.metrics import Metrics
from service.upstreams.readiness import Readiness
from tests.support.fakes import CARD, FakeProber, cancelled, until
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


async def test_each_model_is_not_ready_until_its_probe_succeeds() -> None:
    metrics, prober = Metrics(), FakeProber()
    readiness = Readiness(["see", "llm"], metrics)
    assert readiness.faults == {"see": "not answered yet", "llm": "not answered yet"}
    prober.faults["llm"] = Unavailable("it is gone")
    await readiness.probe(prober, CARD, 1)
    assert [sample(metrics, "glimpse_model_ready", {"model": model}) for model in ("see", "llm")] == [1, 0]


async def test_a_requests_fault_counts_in_the_models_gauge() -> None:
    failing, metrics = {"llm"}, Metrics()
    readiness = Readiness(["see", "llm"], metrics, failing.__contains__)
    await probed(readiness)
    assert [sample(metrics, "glimpse_model_ready", {"model": model}) for model in ("see", "llm")] == [1, 0]


def test_a_probes_result_is_logged_when_it_changes() -> None:
    readiness = Readiness(["llm"], Metrics())
    with capture_logs() as lines:
        for fault, cause in (("gone", "refused"), ("gone", "reset"), ("", ""), ("", "")):
            readiness.set("llm", fault, cause)
        readiness.set("llm", "gone")
    told = {"event": "probe", "model": "llm"}
    assert lines == [
        told | {"log_level": "warning", "fault": "gone", "cause": "refused"},
        told | {"log_level": "info", "fault": "none", "cause": ""},
        told | {"log_level": "warning", "fault": "gone", "cause": ""},
    ]


async def test_a_probe_is_told_the_card_its_time_and_how_fresh_an_answer_may_be() -> None:
    told: list[object] = []

    class Noting(FakeProber):
        async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 9.0) -> None:
            told.append((model, card, timeout_s, fresh_s))

    readiness = Readiness(["llm"], Metrics())
    await readiness.probe(Noting(), CARD, 3.0)
    watching = asyncio.create_task(readiness.watch(Noting(), CARD, interval_s=600.0, timeout_s=7.0))
    await until(lambda: len(told) == 2)
    await cancelled(watching)
    assert told == [("llm", CARD, 3.0, 0.0), ("llm", CARD, 7.0, 300.0)]


async def test_a_probes_fault_is_told_rather_than_the_requests() -> None:
    readiness = Readiness(["llm"], Metrics(), lambda _: True)
    prober = FakeProber()
    prober.faults["llm"] = Unavailable("it is gone", cause="refused")
    with capture_logs() as lines:
        await readiness.probe(prober, CARD, 1)
    assert readiness.faults == {"llm": "it is gone"}
    assert [line["cause"] for line in lines] == ["refused"]


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
    await cancelled(watching)


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
        assert readiness.faults == {"llm": "its probe failed: see the gateway's log"}
        await until(lambda: readiness.ready)
    assert [line["model"] for line in lines if line["event"] == "probe_crashed"] == ["llm"]
    assert [line["cause"] for line in lines if line["event"] == "probe"] == ["KeyError('visual_count')", ""]
    await cancelled(watching)
