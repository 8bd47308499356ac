"""Measure cost against size, one axis at a time, and tell the order of growth of each cost.

    python -m benchmarks.growth          # starts its own services, measures, stops them
    python -m benchmarks.growth --axes clients turns --rounds 3

On each axis every other size stays at its base: one client, one image of 224x224 pixels whose features are known, a
question of 6 tokens, an answer of 8, no earlier turns, no tenant. Sizes have geometric steps. The points of an axis are
visited in rounds, each in another random order. A point begins after the first answer of each client. It lasts some
seconds, at least 10 answers and at least one answer of each client. Every request sent in it is waited for.

An order is the slope of log(cost) against log(size) over the upper half of the sizes: 0 is constant, 1 is linear. Its
95 % interval is a bootstrap over the rounds; fewer than five rounds have the range of their slopes. Latencies, and what
one request takes of its own sizes, may grow as the size does. CPU time of a request against clients, and everything
against entries and tenants, must not grow. A cost grows faster than its cause if its slope is above 1.15 and the
interval above 1; above 0.35 and 0 where it must not grow. The last line names the axes that have such a cost, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.arguments import above_zero, count
from benchmarks.bench.models import BUILD, REFERENCE
from benchmarks.bench.side_by_side import machine
from benchmarks.bench.systems import gateway
from benchmarks.figures import command
from benchmarks.growth import in_process, served, tenants
from benchmarks.growth.curves import Curve, Found, few
from benchmarks.growth.in_process import InProcess
from benchmarks.growth.report import draw, faster, summary, text
from benchmarks.growth.served import Served
from benchmarks.growth.tenants import OfTenants

CURVES: tuple[Curve, ...] = (*served.CURVES, *tenants.CURVES, *in_process.CURVES)
AXES = tuple(dict.fromkeys(curve.axis for curve in CURVES))


def measure(curves: Sequence[Curve], rounds: int, seconds: float, seed: int) -> dict[tuple[str, str], Found]:
    """Measure these curves one kind after the other -> figures by curve, size and round."""
    found: dict[tuple[str, str], Found] = {}
    if asked := [curve for curve in curves if isinstance(curve, Served)]:
        with TemporaryDirectory() as folder, gateway(REFERENCE, Path(folder), served.SETTINGS) as system:
            found |= asyncio.run(served.measure(system, asked, rounds, seconds, seed))
    if of_tenants := [curve for curve in curves if isinstance(curve, OfTenants)]:
        found |= tenants.measure(of_tenants, rounds, seconds, seed)
    if tables := [curve for curve in curves if isinstance(curve, InProcess)]:
        found |= asyncio.run(in_process.measure(tables, rounds, seed))
    return found


def report(curves: Sequence[Curve], found: dict[tuple[str, str], Found], options: argparse.Namespace) -> dict[str, Any]:
    summaries = [summary(curve, found[curve.key]) for curve in curves]
    on = machine() | {"command": command("python -m benchmarks.growth", sys.argv[1:])}
    told = {"rounds": options.rounds, "seconds": options.seconds, "seed": options.seed, "small": options.small}
    return {"machine": on, **told, "curves": summaries, "faster_than_its_cause": faster(summaries)}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, metavar="AXIS", help=f"of {', '.join(AXES)}")
    parser.add_argument("--rounds", type=count, default=5, help="visits of each point, at least 2 [5]")
    parser.add_argument("--seconds", type=above_zero, default=5.0, help="a service's point lasts at least so long [5]")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the points, and of the questions [0]")
    parser.add_argument("--small", action="store_true", help="the three smallest sizes alone: try whether it works")
    parser.add_argument("--out", type=Path, default=BUILD / "growth.json",
                        help="and a picture of the same name [build/bench/growth.json]")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: a range needs several rounds")
    return options


def main() -> int:
    options = parsed()
    curves = [curve for curve in CURVES if curve.axis in options.axes]
    if options.small:
        curves = [replace(curve, sizes=few(curve.sizes)) for curve in curves]
    found = report(curves, measure(curves, options.rounds, options.seconds, options.seed), options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(options.out.with_suffix(".png"), found)
    print(text(found["curves"]))
    return 1 if found["faster_than_its_cause"] else 0


if __name__ == "__main__":
    sys.exit(main())
