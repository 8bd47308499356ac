"""Measure systems under load, side by side in one run: `glimpse bench`.

    glimpse bench --scenario versus --model base              # a named measurement and its verdicts
    glimpse bench --systems naive,glimpse --workloads mixed:0.5,cold --clients 16 --seconds 30 --rounds 3
    glimpse bench --systems glimpse,glimpse-no-cache --workloads repeat --rate 20

Workloads: cold, follow_up, mixed[:SHARE of follow-ups], multi_image[:IMAGES], repeat[:ZIPF exponent], same. Writes
OUT.json and OUT.png. One system runs at a time; nothing else but it and the load generator may run on the machine.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import above_zero, count
from benchmarks.bench.load import Arrivals
from benchmarks.bench.models import BUILD, MODELS
from benchmarks.bench.report import text, write
from benchmarks.bench.scenarios import SCENARIOS
from benchmarks.bench.side_by_side import Case, Comparison, compare
from benchmarks.bench.systems import SYSTEMS
from benchmarks.bench.workloads import Workload


def workload_of(said: str) -> Workload:
    """Parse `mixed:0.75`, `multi_image:2`, `repeat:1.1`, or a name alone. Raises argparse.ArgumentTypeError."""
    shape, _, number = said.partition(":")
    knob = {"mixed": ("share", float), "multi_image": ("images", int), "repeat": ("zipf", float)}.get(shape)
    if shape not in Workload.SHAPES or (number and knob is None):
        raise argparse.ArgumentTypeError(f"{said!r} is not a workload: choose one of {', '.join(Workload.SHAPES)}")
    try:
        return Workload(shape, **({knob[0]: knob[1](number)} if number and knob else {}))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{said!r}: {exc}") from exc


def names(said: str, known: object) -> tuple[str, ...]:
    found = tuple(said.split(","))
    unknown = [name for name in found if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is unknown: choose from {', '.join(known)}")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("glimpse bench", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument(
        "--scenario", choices=SCENARIOS, help="a named measurement with its own systems, workloads and arrivals"
    )
    made.add_argument("--model", choices=MODELS, default="reference")
    made.add_argument("--seconds", type=above_zero, default=30.0, help="duration of each measurement [30]")
    made.add_argument("--rounds", type=count, default=3, help="rounds over all systems in turn [3]")
    made.add_argument("--out", type=Path, help="path of the report without suffix [build/bench/NAME]")
    made.add_argument("--systems", type=lambda said: names(said, SYSTEMS), default=("naive", "glimpse"),
                      help=f"comma-separated, from {', '.join(SYSTEMS)}")  # fmt: skip
    made.add_argument("--workloads", type=lambda said: tuple(map(workload_of, said.split(","))),
                      default=(Workload("mixed"),))  # fmt: skip
    when = made.add_mutually_exclusive_group()
    when.add_argument("--clients", type=count, default=16, help="clients of a closed loop [16]")
    when.add_argument("--rate", type=above_zero, help="Poisson arrivals, requests/s")
    when.add_argument(
        "--burst", nargs=2, type=above_zero, metavar=("SIZE", "EVERY_S"), help="SIZE requests at once, every EVERY_S s"
    )
    return made


def unequal(systems: Sequence[str], workloads: Sequence[Workload]) -> str:
    """Say why these systems would not do the same work; empty if they do."""
    others = [name for name in systems if SYSTEMS[name].asked_as != "glimpse"]
    if others and any(workload.shape == "multi_image" for workload in workloads):
        return f"multi_image: {', '.join(others)} would see the first image alone: choose systems named glimpse"
    return ""


def main() -> int:
    """Return 0 if every promise is met, else 1."""
    made = parser()
    told = made.parse_args()
    if told.burst and told.burst[0] % 1:
        made.error(f"--burst: SIZE is a whole number of requests, not {told.burst[0]:g}")
    if not told.scenario and (refusal := unequal(told.systems, told.workloads)):
        made.error(refusal)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the running system first
    if told.scenario:
        report = SCENARIOS[told.scenario](told.model, told.seconds, told.rounds)
    else:
        arrivals = Arrivals(clients=told.clients)
        if told.rate:
            arrivals = Arrivals(rate=told.rate)
        elif told.burst:
            arrivals = Arrivals(burst=(int(told.burst[0]), told.burst[1]))
        cases = tuple(Case(workload, arrivals, told.seconds) for workload in told.workloads)
        report = compare(Comparison(told.model, told.systems, cases, told.rounds))
    out = told.out or BUILD / f"{told.scenario or 'side_by_side'}_{told.model}"
    write(out, report)
    sys.stdout.write(f"{text(report)}\n\n{out}.json{' and .png' if report.get('runs') else ''}\n")
    return 0 if all(verdict["met"] for verdict in report.get("verdict", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
