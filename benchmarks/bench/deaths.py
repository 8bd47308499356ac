"""Measure overload while parts die: a gateway with its Triton, and then the Triton of the gateway that is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.bench.load import Arrivals
from benchmarks.bench.measuring import Measurement, measure
from benchmarks.bench.models import BUILD, Model, ready
from benchmarks.bench.processes import family
from benchmarks.bench.report import table
from benchmarks.bench.side_by_side import Case, machine, plan, say
from benchmarks.bench.summary import REFUSALS, Verdict, by_kind, latencies, mixture, slowest, summary
from benchmarks.bench.systems import Running, answers, gateway, made
from benchmarks.bench.workloads import Workload

STRAIN = 3.0  # arrivals, in capacities of one gateway with its Triton
LEAST_S = 60.0
CROWDS = (16, 200)  # clients of a closed loop; a refused one asks again after 50 to 200 ms
POLL_S = 0.1
Outage = tuple[float, float]  # seconds since the load began


def deaths(model: str, seconds: float, _rounds: int) -> dict[str, Any]:
    """Poisson arrivals at three times the capacity for 60 s: at one gateway, and at two of which parts die.

    After a quarter of the time a gateway is killed, and its Triton ends. After half of it the other one's Triton is
    killed, and starts again. Requests that find their gateway dead ask the other one. While no Triton runs, nobody can
    answer, so this time does not count.
    """
    served = ready(model)
    folder = BUILD / "logs" / f"deaths_{model}"
    mixed = Workload("mixed")
    runs: list[dict[str, Any]] = []
    with gateways(served, folder, 1) as up:
        closed = run(up, Case(mixed, Arrivals(clients=32), seconds), served, 1, runs)
        capacity = closed["requests_per_s"]
        crowds = [
            run(up, Case(mixed, Arrivals(clients=count), seconds, timeout_s=2 * served.slo_s), served, number, runs)
            for number, count in enumerate(CROWDS, 2)
        ]
    case = Case(mixed, Arrivals(rate=STRAIN * capacity), max(seconds, LEAST_S), timeout_s=served.slo_s)
    with gateways(served, folder, 1) as up:
        rest = measure(up, plan(case, served, 4))
    with gateways(served, folder, 2) as up, Killer(up, case.duration_s) as killer:
        measured = measure(up, plan(case, served, 4), began=killer.begin)
    outages = killer.outages
    alone, left = good_per_s(rest.results, [], served.slo_s), good_per_s(measured.results, outages, served.slo_s)
    ends = {"one gateway": rest, "two gateways, deaths": measured}
    for name, each in ends.items():
        note_run(name, each, served, runs)
    refused_ms = {f"{count} clients": figures["refusal_ms"] for count, figures in zip(CROWDS, crowds, strict=True)}
    refused_ms |= {"one gateway": latencies(refusals_s(rest, [])), "deaths": latencies(refusals_s(measured, outages))}
    kinds = {name: mixture([by_kind(each.results, served.slo_s)]) for name, each in ends.items()}
    down_s = sum(end - begin for begin, end in outages)
    promises = [
        Verdict("goodput while parts die / of one gateway alone", left / alone if alone else 0.0, 0.9, True,
                f"{left:.1f} and {alone:.1f} answers/s; no Triton for {down_s:.1f} s; {kinds}"),
        slowest_refusals(refused_ms),
    ]  # fmt: skip
    return {
        "title": f"{served.title}: {STRAIN:g} times the capacity while a gateway and a Triton die",
        "model": model,
        "machine": machine(),
        "capacity_requests_per_s": capacity,
        "outages_s": outages,
        "runs": runs,
        "table": table(runs),
        "verdict": [promise.to_json() for promise in promises],
    }


def run(up: Running, case: Case, served: Model, number: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = measure(up, plan(case, served, number))
    return note_run(case.label, measured, served, runs)


def note_run(label: str, measured: Measurement, served: Model, runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures = summary(measured, served.slo_s)
    say(f"  {label}: {figures['goodput_per_s']:.2f} in time/s, {figures['outcomes']}, refusals {figures['refusal_ms']}")
    runs.append({"system": "glimpse", "workload": label, "round": 1, "figures": figures})
    return figures


@contextmanager
def gateways(model: Model, folder: Path, count: int) -> Iterator[Running]:
    """Start gateways that share nothing: each has its own Triton."""
    with ExitStack() as stack:
        fronts = [stack.enter_context(gateway(model, made(folder / f"gateway_{n}"), {})) for n in range(count)]
        urls = tuple(url for front in fronts for url in front.urls)
        yield Running("glimpse", urls, tuple(pid for front in fronts for pid in front.pids), made(folder))


class Killer:
    """Kill the parts on time, and note while which time nobody can answer."""

    def __init__(self, up: Running, duration_s: float) -> None:
        self.outages: list[Outage] = []
        self._first, self._second = up.pids
        self._port = urlsplit(up.urls[1]).port or 0
        self._duration_s = duration_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """The load begins now."""
        self._began = time.monotonic()
        self._thread.start()

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._over.wait(self._duration_s / 4):
            return
        os.kill(self._first, signal.SIGKILL)
        if self._over.wait(self._duration_s / 4):
            return
        (triton,) = (process.pid for process in family(self._second) if process.role == "triton")
        os.kill(triton, signal.SIGKILL)
        begin, is_down = self._now(), True
        while not self._over.wait(POLL_S):
            is_ready = answers(self._port, "/health/ready")
            if is_ready == is_down:
                if is_ready:
                    self.outages.append((begin, self._now()))
                begin, is_down = self._now(), not is_ready
        if is_down:
            self.outages.append((begin, self._now()))

    def _now(self) -> float:
        return time.monotonic() - self._began


def good_per_s(results: Sequence[dict[str, Any]], outages: Sequence[Outage], slo_s: float) -> float:
    """Answers in time per second, of the time in which somebody could answer."""
    good = sum(result["outcome"] == "ok" and result["end"] - result["at"] <= slo_s for result in results)
    span_s = max((result["end"] for result in results), default=0.0)
    down_s = sum(max(0.0, min(end, span_s) - begin) for begin, end in outages)
    return good / (span_s - down_s) if span_s > down_s else 0.0


def refusals_s(measured: Measurement, outages: Sequence[Outage]) -> list[float]:
    """How long refusals took, but for those that were sent while no Triton ran."""
    return [
        result["end"] - result["sent"]
        for result in measured.results
        if result["outcome"] in REFUSALS and not any(begin <= result["sent"] <= end for begin, end in outages)
    ]


def slowest_refusals(refused_ms: dict[str, dict[str, float] | None]) -> Verdict:
    """Judge the slowest of all loads' refusals; not measured if nothing was refused."""
    found = {name: slowest(each) for name, each in refused_ms.items()}
    most = max((ms for ms in found.values() if ms is not None), default=None)
    return Verdict("slowest refusals (p99), ms", most, 50, False, f"{found}")
