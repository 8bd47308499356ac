"""Run a campaign of faults: two gateways, two Tritons and one Redis under load, and the clients' own ledger.

    python -m benchmarks.faults --seed 1 --count 200
    python -m benchmarks.faults --seed 1 --count 20 --kinds "model killed,Triton killed"

Writes OUT.json, OUT.png and the logs of all parts. Exits with 1 if an invariant does not hold. Needs redis-server. The
full disks and the full shared memory need `unshare` and the right to use it. Without it these faults are left out, and
the report says so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import uvloop

from benchmarks.arguments import count
from benchmarks.bench.models import BUILD
from benchmarks.bench.side_by_side import machine
from benchmarks.faults import isolation
from benchmarks.faults.campaign import Campaign, Drawn, draw
from benchmarks.faults.catalogue import CATALOGUE
from benchmarks.faults.invariants import Records, check
from benchmarks.faults.report import Run, report, text, write
from benchmarks.faults.world import World
from benchmarks.figures import command

NO_NAMESPACES = "needs a small disk of its own, and this machine allows no namespaces"


def kinds_of(said: str) -> tuple[str, ...]:
    """Parse names of CATALOGUE. Raises argparse.ArgumentTypeError."""
    names = tuple(name.strip() for name in said.split(","))
    if unknown := [name for name in names if name not in CATALOGUE]:
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(unknown)}. Choose from {', '.join(CATALOGUE)}")
    return names


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, default=1, help="decides kinds, order, targets and durations [1]")
    made.add_argument("--count", type=count, default=200, help="number of faults [200]")
    made.add_argument("--kinds", type=kinds_of, default=tuple(CATALOGUE), help="comma-separated [all]")
    made.add_argument("--out", type=Path, help="path of the report without suffix [build/bench/faults_SEED]")
    return made


async def run(seed: int, faults: list[Drawn], logs: Path) -> tuple[Records, float]:
    """Return the records, and when the load began."""
    async with World(random.Random(f"{seed}:world")) as world:
        campaign = Campaign(seed, world)
        try:
            return await campaign.run(faults), campaign.began
        finally:
            world.keep_logs(logs)


def main() -> int:
    """Return 0 if every invariant holds, else 1."""
    told = parser().parse_args()
    isolation.enter("benchmarks.faults", sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    chosen = [(name, CATALOGUE[name]) for name in told.kinds]
    left_out = {} if isolation.is_inside() else {name: NO_NAMESPACES for name, kind in chosen if kind.needs_isolation}
    faults = draw(told.seed, told.count, [each for each in chosen if each[0] not in left_out])
    out = told.out or BUILD / f"faults_{told.seed}"
    logs = out.with_name(f"{out.name}_logs")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        records, began = runner.run(run(told.seed, faults, logs))
    violations = check(records)
    head = machine() | {"command": command("python -m benchmarks.faults", sys.argv[1:]), "nice": os.nice(0)}
    found = report(Run(told.seed, told.count, head, left_out, began), records, violations)
    write(out, found)
    sys.stdout.write(f"{text(found)}\n\n{out}.json and .png, logs in {logs}\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
