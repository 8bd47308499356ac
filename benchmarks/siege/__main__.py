"""Honest clients beside every kind of hostile connection at once.

    python -m benchmarks.siege --seconds 60 --out benchmarks/results/siege.json

Honest load (8 clients, a quarter of the questions about new images) runs undisturbed first, then under attack: 10,000
idle connections, 3,000 incomplete headers (slowloris), 100 endless headers, 50 clients that pipeline and never read, 10
that announce a body and send none, two that repeat a scan bomb every second, and two that repeat a picture of
50,000,000 x 1 pixels. Attackers call from eight addresses of this machine. They and the honest clients have a process
each; the attackers' is 10 nicer, so that two cores measure what the service makes of an attack, and not what making the
attack costs. An honest client pauses between an answer and its next question: the machine is busy, and not full.

The caches are small, so that they are full when the attack begins. With the default sizes they hold every new image of
both phases, and the second phase's honest images (about 100 MB) would count as the attack's memory.

Bars: the honest p95 is at most 1.5 times the undisturbed one, no honest request fails, the gateway stays within 256 MB.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from benchmarks.arguments import above_zero
from benchmarks.bench.load import Arrivals, Plan
from benchmarks.bench.measuring import Measurement, measure
from benchmarks.bench.models import PROJECT, REFERENCE
from benchmarks.bench.processes import DECODER
from benchmarks.bench.systems import Running, gateway
from benchmarks.bench.workloads import Workload
from benchmarks.figures import tell
from benchmarks.siege.attackers import KINDS, Attack

CLIENTS = 8
FOLLOW_UPS = 0.75  # share
PAUSE_S = 0.3  # of an honest client
MOST_P95 = 1.5  # times the undisturbed one
MOST_MB = 256.0
MAX_TOKENS = 8
CACHES_MB = {"FEATURE_CACHE_BYTES": 32, "VISUAL_CACHE_BYTES": 8, "IMAGE_STORE_BYTES": 24}
FIRST_ATTACKED = 1_000_000  # number of the first new image under attack


def honest(seconds: float, first_new: int) -> Plan:
    workload = Workload("mixed", share=FOLLOW_UPS)
    clients = Arrivals(clients=CLIENTS)
    return Plan("glimpse", [], workload, clients, seconds, MAX_TOKENS, "", first_new=first_new, pause_s=PAUSE_S)


def summary(found: Measurement) -> dict[str, Any]:
    """Latencies in ms of answers; outcomes of all; memory of the gateway and, apart, of its decoders; CPU by role."""
    seconds = [each["end"] - each["sent"] for each in found.results if each["outcome"] == "ok"]
    cut = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "requests": len(found.results),
        "outcomes": dict(Counter(each["outcome"] for each in found.results)),
        "reduced": sum(each["reduced"] for each in found.results),
        "p50_ms": round(cut[49] * 1e3, 1),
        "p95_ms": round(cut[94] * 1e3, 1),
        "p99_ms": round(cut[98] * 1e3, 1),
        "gateway_most_mb": round(max(sample.memory_mb.get("gateway", 0.0) for sample in found.samples), 1),
        "decoders_most_mb": round(max(sample.memory_mb.get(DECODER, 0.0) for sample in found.samples), 1),
        "gateway_most_files": max(sample.descriptors.get("gateway", 0) for sample in found.samples),
        "cpu_s": {role: round(spent, 1) for role, spent in found.cpu_s.items()},
    }


def besieged(running: Running, seconds: float, attack: Attack) -> tuple[Measurement, dict[str, Any]]:
    """The honest load while the attack is on. Raises RuntimeError if the attackers fail."""
    url = urlsplit(running.urls[0])
    attack = replace(attack, host=url.hostname or "", port=url.port or 80)
    command = [sys.executable, "-m", "benchmarks.siege.attackers"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT, text=True) as attackers:
        try:
            assert attackers.stdin is not None
            assert attackers.stdout is not None
            attackers.stdin.write(json.dumps(asdict(attack)) + "\n")
            attackers.stdin.flush()
            if attackers.stdout.readline() != "begun\n":
                raise RuntimeError("the attackers did not begin: see their error above")
            found = measure(running, honest(seconds, FIRST_ATTACKED))
            attackers.stdin.close()
            said = json.loads(attackers.stdout.read())
        finally:
            if attackers.poll() is None:
                attackers.kill()
    return found, said


def siege(seconds: float, attack: Attack, settings: Mapping[str, str]) -> dict[str, Any]:
    with TemporaryDirectory() as folder, gateway(REFERENCE, Path(folder), settings) as running:
        calm = summary(measure(running, honest(seconds, 100)))
        before_mb = calm["gateway_most_mb"]
        found, attackers = besieged(running, seconds, attack)
        storm = summary(found)
        log = Path(folder, "gateway.log").read_text(errors="replace")
    ratio = round(storm["p95_ms"] / calm["p95_ms"], 2)
    failed = {word: count for word, count in storm["outcomes"].items() if word != "ok"}
    bars = {
        f"p95 at most {MOST_P95} times the undisturbed one": ratio <= MOST_P95,
        "no honest request fails": not failed,
        f"the gateway stays within {MOST_MB:g} MB": storm["gateway_most_mb"] <= MOST_MB,
        "no fault in the log": "Traceback" not in log and "event=fault" not in log,
    }
    return {
        "seconds": seconds,
        "attack": {name: getattr(attack, name) for name in (*KINDS, "niceness")},
        "settings": dict(settings),
        "p95_ratio": ratio,
        "gateway_grew_mb": round(storm["gateway_most_mb"] - before_mb, 1),
        "bars": bars,
        "undisturbed": calm,
        "attacked": storm,
        "attackers": attackers,
        "log": Counter(line.split("event=")[1].split()[0] for line in log.splitlines() if "event=" in line),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=above_zero, default=60.0, help="of each of the two phases [60]")
    parser.add_argument("--scale", type=above_zero, default=1.0, help="share of the attackers [1]")
    parser.add_argument("--only", help="comma-separated kinds of attackers; the others stay away")
    parser.add_argument("--nice", type=int, default=10, help="by how much attackers are nicer than the service [10]")
    parser.add_argument("--max-connections", type=int, help="the gateway's setting, if not its default")
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the gateway first
    full = {name: getattr(Attack("", 0), name) for name in KINDS}
    only = told.only.split(",") if told.only else list(full)
    counts = {name: max(1, round(value * told.scale)) if name in only else 0 for name, value in full.items()}
    settings = {name: str(most << 20) for name, most in CACHES_MB.items()}
    if told.max_connections:
        settings |= {name: str(told.max_connections) for name in ("MAX_CONNECTIONS", "MAX_CONNECTIONS_PER_ADDRESS")}
    report = siege(told.seconds, Attack("", 0, **counts, niceness=told.nice), settings)
    tell(report, told.out)
    return 0 if all(report["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
