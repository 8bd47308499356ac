"""Run the load generator against one running system and sample its processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from benchmarks.bench.load import Plan
from benchmarks.bench.models import PROJECT
from benchmarks.bench.processes import Process, cpu_by_role, memory_by_role
from benchmarks.bench.systems import Running

SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources that a system held at one moment."""

    at_s: float
    memory_mb: dict[str, float]  # by role
    threads: dict[str, int]
    descriptors: dict[str, int]
    shared_memory: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """The results of one run of the load generator."""

    plan: Plan
    elapsed_s: float
    load_cpu_s: float  # the load generator's own
    cpu_s: dict[str, float]  # the system's, by role
    samples: list[Sample]
    results: list[dict[str, Any]]
    load_lags_s: list[float]  # how late the load generator's own loop was


class Watch:
    """Sample a system's processes during the load."""

    def __init__(self, system: Running) -> None:
        self.samples: list[Sample] = []
        self._system = system
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples.append(sample(self._system, time.monotonic() - self._began))
            if self._ended.wait(SAMPLE_S):
                return


def sample(system: Running, at_s: float) -> Sample:
    processes = system.processes()
    return Sample(
        at_s,
        memory_by_role(processes),
        _sum(processes, "threads"),
        _sum(processes, "descriptors"),
        system.shared_memory(),
    )


def _sum(processes: list[Process], what: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for process in processes:
        found[process.role] = found.get(process.role, 0) + getattr(process, what)
    return found


def measure(system: Running, plan: Plan, began: Callable[[], None] | None = None) -> Measurement:
    """Run the load to its end; `began` is called when it begins. Raises RuntimeError if the load generator fails."""
    out = system.folder / "load.json"
    plan = replace(plan, system=system.asked_as, urls=list(system.urls), out=str(out))
    log = Path(system.folder / "load.log")
    with log.open("wb") as errors:
        load = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=PROJECT,
        )
    with load:
        try:
            _tell(load, plan.to_json())
            _expect(load, "begin", log)
            with Watch(system) as watch:
                before = system.processes()
                _tell(load, "go")
                if began is not None:
                    began()
                _expect(load, "end", log)
                after = system.processes()
        finally:
            load.kill()
    found = orjson.loads(out.read_bytes())
    return Measurement(
        plan,
        found["elapsed_s"],
        found["cpu_s"],
        cpu_by_role(before, after),
        watch.samples,
        found["results"],
        found["lags_s"],
    )


def _tell(load: subprocess.Popen[bytes], line: str) -> None:
    assert load.stdin is not None
    load.stdin.write(line.encode() + b"\n")
    load.stdin.flush()


def _expect(load: subprocess.Popen[bytes], line: str, log: Path) -> None:
    assert load.stdout is not None
    said = load.stdout.readline().decode().strip()
    if said != line:
        raise RuntimeError(f"the load generator failed, see {log}:\n{log.read_text(errors='replace')[-2000:]}")
