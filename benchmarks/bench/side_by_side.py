"""Compare systems in one run, in rounds A B C A B C ...

Each system is alone on the machine while it is measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.bench.load import Arrivals, Plan
from benchmarks.bench.measuring import measure
from benchmarks.bench.models import BUILD, PROJECT, Model, ready
from benchmarks.bench.report import table
from benchmarks.bench.summary import first_tokens, profile, summary
from benchmarks.bench.systems import SYSTEMS, System, running
from benchmarks.bench.workloads import KNOWN, Workload
from benchmarks.figures import command, commit
from service.core.card import LLM_TOKENIZER

Figure = TypeVar("Figure")
NEW_IMAGES = 100_000  # distance between the image numbers of two measurements
IMAGES_BY_ID = ("follow_up", "mixed")  # workloads that ask about known images
LIMITED = ("follow_up", "cold")  # workloads with a bare engine limit


@dataclass(frozen=True, slots=True)
class Case:
    """One workload with its arrivals and limits."""

    workload: Workload
    arrivals: Arrivals
    duration_s: float
    only: tuple[str, ...] = ()  # systems; empty: all
    warm_repeats: int = 0
    visual_tokens: tuple[int, int] | None = None
    timeout_s: float = 120.0  # how long a client waits
    scored: bool = False  # answers are compared with the right ones

    @property
    def label(self) -> str:
        return f"{self.workload.label}, {self.arrivals.label}"


@dataclass(frozen=True, slots=True)
class Comparison:
    model: str
    systems: tuple[str, ...]
    cases: tuple[Case, ...]
    rounds: int
    engine: bool = True  # measure the bare limit too
    every_first_token: bool = False  # also report each request's first token time, so that rounds can be pooled
    settings: Mapping[str, str] = field(default_factory=dict)  # of every gateway, beside its own

    @property
    def compared(self) -> dict[str, System]:
        """Return the systems by name, with all of their settings."""
        return {
            name: replace(SYSTEMS[name], settings={**self.settings, **SYSTEMS[name].settings}) for name in self.systems
        }


def say(what: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")
    sys.stderr.flush()


def compare(comparison: Comparison) -> dict[str, Any]:
    """Measure all rounds -> the report. A system that fails once is named in it and left out from then on."""
    model = ready(comparison.model)
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number, system in turns(comparison):
        if system in failed:
            continue
        try:
            runs += turn(system, model, comparison, number)
        except RuntimeError as error:
            failed[system] = str(error)
            say(f"{system} failed: {error}")
    keep(runs)  # so that a failure in what follows does not lose them
    engine = engine_limit(model, runs) if comparison.engine else None
    return {
        "title": model.title,
        "model": comparison.model,
        "machine": machine(),
        "systems": {name: {"how": system.how, "settings": dict(system.settings)} for name, system in
                    comparison.compared.items()},
        "failed": failed,
        "engine": engine,
        "profile": profiles(comparison, runs, engine) if engine else {},
        "table": table(runs),
        "runs": runs,
    }  # fmt: skip


def keep(runs: Sequence[dict[str, Any]]) -> None:
    """Write the measured rounds to build/bench/runs.json."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")


def turns(comparison: Comparison) -> Iterator[tuple[int, str]]:
    for number in range(comparison.rounds):
        for system in comparison.systems:
            yield number, system


def turn(name: str, model: Model, comparison: Comparison, number: int) -> list[dict[str, Any]]:
    """Start one system, measure every case, stop it."""
    system, cases = comparison.compared[name], comparison.cases
    found = []
    started = time.monotonic()
    with running(system, model, BUILD / "logs" / f"{model.name}_{name}") as up:
        say(f"{model.name}, round {number + 1}: {name} is up after {time.monotonic() - started:.0f} s")
        for place, case in enumerate(cases):
            if case.only and name not in case.only:
                continue
            measured = measure(up, plan(case, model, number * len(cases) + place + 1))
            figures = summary(measured, model.slo_s)
            if comparison.every_first_token:
                figures["every_first_token_ms"] = first_tokens(measured.results)
            say(f"  {case.label}: {figures['requests_per_s']:.2f} requests/s, {figures['outcomes']}")
            found.append(
                {"system": name, "workload": case.label, "shape": case.workload.shape, "round": number + 1,
                 "load_average": os.getloadavg()[0], "figures": figures}
            )  # fmt: skip
    return found


def plan(case: Case, model: Model, number: int) -> Plan:
    """Plan a load; every system gets the same questions in the same round."""
    return Plan(
        system="",
        urls=[],
        workload=case.workload,
        arrivals=case.arrivals,
        duration_s=case.duration_s,
        max_tokens=model.max_tokens,
        out="",
        seed=number,
        first_new=KNOWN + NEW_IMAGES * number,
        warm=case.workload.shape in IMAGES_BY_ID,
        warm_repeats=case.warm_repeats,
        visual_tokens=case.visual_tokens,
        timeout_s=case.timeout_s,
        tokenizer=str(model.repository / LLM_TOKENIZER),
        scored=case.scored,
    )


def engine_limit(model: Model, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measure the bare engine limit of the LIMITED workloads, on inputs of their answers' average size."""
    works: dict[str, list[int]] = {}
    for shape in LIMITED:
        figures = [run["figures"] for run in runs if run["system"] == "glimpse" and run["shape"] == shape]
        if figures:
            works[shape] = [round(statistics.mean(each[what] for each in figures)) for what in
                            ("vision_tokens", "text_tokens")]  # fmt: skip
    say(f"{model.name}: the bare engine limit, vision and text tokens {works}")
    command = [sys.executable, "-m", "benchmarks.bench.engine", str(model.repository), str(answer_tokens(model)),
               json.dumps(works)]  # fmt: skip
    said = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def profiles(comparison: Comparison, runs: Sequence[dict[str, Any]], engine: dict[str, Any]) -> dict[str, Any]:
    """Profile the closed loops of several clients; one client leaves cores idle, and so may an open loop."""
    found = {}
    for case in comparison.cases:
        rounds = [run["figures"] for run in runs if (run["system"], run["workload"]) == ("glimpse", case.label)]
        if rounds and case.workload.shape in LIMITED and (case.arrivals.clients or 0) > 1:
            found[case.label] = profile(rounds, engine, case.workload.shape)
    return found


def answer_tokens(model: Model) -> int:
    """Return the LLM's tokens per answer: `reference` writes a word and the end, `base` uses all of max_tokens."""
    return 2 if model.name == "reference" else model.max_tokens


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "command": command("glimpse bench", sys.argv[1:]),
    }


def rounds_of(
    report: dict[str, Any], system: str, case: Case, figure: Callable[[dict[str, Any]], Figure | None]
) -> list[Figure]:
    """Return one figure of every round, in order; nothing if a round lacks it."""
    found = [
        figure(run["figures"]) for run in report["runs"] if (run["system"], run["workload"]) == (system, case.label)
    ]
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else []
