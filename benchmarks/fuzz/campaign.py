"""Send many mutants to one gateway over a few connections, and watch its processes meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench.http_client import HttpClient
from benchmarks.bench.processes import DECODER, Process, family
from benchmarks.fuzz.sending import Mutant, Outcome, send_patiently

SETTLED = 1000  # requests after which memory is compared
SAMPLE_EVERY = 250  # requests
LEAST_SAMPLES = 8  # of memory, after SETTLED
MAX_GROWTH = 0.02
SIGPROF = -27  # the status of a decoder that passed its limit of CPU time

Make = Callable[[int, int], Mutant]  # of a seed and a number


@dataclass(frozen=True, slots=True)
class Target:
    """A running gateway."""

    host: str
    port: int
    pid: int
    log: Path

    def processes(self) -> list[Process]:
        return family(self.pid)


@dataclass(slots=True)
class Campaign:
    """What was sent and what came of it."""

    seed: int
    folder: Path  # for what failed
    outcomes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    overloads: int = 0
    slowest_s: float = 0.0
    memory: list[tuple[int, dict[str, int]]] = field(default_factory=list)  # requests so far, bytes by role
    elapsed_s: float = 0.0

    def keep(self, number: int, mutant: Mutant, outcome: Outcome) -> None:
        self.outcomes[outcome.word] += 1
        self.mutations.update(mutant.done)
        self.slowest_s = max(self.slowest_s, outcome.seconds)
        if outcome.fault:
            self.fail(number, mutant, outcome)

    def fail(self, number: int, mutant: Mutant, outcome: Outcome) -> None:
        """Keep the request, so that --replay sends it again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.seed}_{number}.http"
        file.write_bytes(mutant.request)
        said = outcome.response.body[:500].decode(errors="replace") if outcome.response else ""
        found = {"seed": self.seed, "number": number, "done": mutant.done, "is_whole": mutant.is_whole}
        found |= {"fault": outcome.fault, "word": outcome.word, "seconds": round(outcome.seconds, 2), "said": said}
        file.with_suffix(".json").write_text(json.dumps(found, indent=2))
        self.faults.append(found | {"file": file.name})


async def run(make: Make, count: int, target: Target, campaign: Campaign, connections: int) -> list[str]:
    """Send `count` mutants. Returns what went wrong besides single requests."""
    client = HttpClient(target.host, target.port)
    before = target.processes()
    log_start = target.log.stat().st_size
    numbers, ended = iter(range(count)), itertools.count(1)
    started = time.monotonic()

    async def sender() -> None:
        for number in numbers:
            mutant = make(campaign.seed, number)
            outcome, overloads = await send_patiently(mutant, client)
            campaign.overloads += overloads
            campaign.keep(number, mutant, outcome)
            if (done := next(ended)) % SAMPLE_EVERY == 0:
                campaign.memory.append((done, memory_of(target.processes())))
                sys.stderr.write(f"\r{done:,} of {count:,}, {len(campaign.faults)} faults ")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(sender())
    campaign.elapsed_s = time.monotonic() - started
    client.close()
    with target.log.open("rb") as log:
        log.seek(log_start)
        logged = log.read().decode(errors="replace")
    return [*dead(before, target.processes()), *faults_in(logged), *grown(campaign.memory)]


def memory_of(processes: list[Process]) -> dict[str, int]:
    """Resident bytes by role, of the largest process each: decoding processes come and go."""
    found: dict[str, int] = {}
    for process in processes:
        found[process.role] = max(found.get(process.role, 0), process.rss_bytes)
    return found


def grown(samples: list[tuple[int, dict[str, int]]]) -> list[str]:
    """What takes more memory at the end than after the first requests; medians of up to four samples each."""
    return [
        f"{role} takes {growth:.1%} more memory"
        for role, growth in growth_of(samples).items()
        if growth > MAX_GROWTH and role != DECODER
    ]


def growth_of(samples: list[tuple[int, dict[str, int]]], since: int = SETTLED) -> dict[str, float]:
    """By role, the share by which memory has grown since so many requests; empty for a short campaign."""
    later = [held for done, held in samples if done > since]
    if len(later) < LEAST_SAMPLES:
        return {}
    first, last = later[:4], later[-4:]
    return {
        role: statistics.median(held[role] for held in last) / statistics.median(held[role] for held in first) - 1
        for role in first[0]
        if all(role in held for held in (*first, *last))
    }


def memory_unchecked(count: int) -> str:
    """Say that a campaign is too short for the limit on memory; empty if it is not."""
    least = SETTLED + LEAST_SAMPLES * SAMPLE_EVERY
    return f"memory not checked: that takes {least:,} requests or more" if count < least else ""


def dead(before: list[Process], after: list[Process]) -> list[str]:
    """Processes that are gone, without those that decode."""
    left = {process.pid for process in after}
    return [f"{each.role} died" for each in before if each.pid not in left and each.role != DECODER]


def faults_in(log: str) -> list[str]:
    """Lines of the gateway's log that no request may cause."""
    found = [line for line in log.splitlines() if "Traceback" in line or "event=fault" in line]
    found += [f"a decoder ended by {reason} with {status}" for reason, status in ends_of_decoders(log)
              if (reason, status) != ("signal", SIGPROF)]  # fmt: skip
    return found


def ends_of_decoders(log: str) -> Iterator[tuple[str, int]]:
    """Reason and exit status of each decoding process that an image ended."""
    for line in log.splitlines():
        if "event=decoder_ended" in line:
            fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
            yield fields.get("reason", ""), int(fields.get("status", 0))


def report_of(campaign: Campaign, count: int, wrong: list[str], target: Target) -> dict[str, Any]:
    """The campaign as JSON."""
    ends = Counter(f"{reason} {status}" for reason, status in ends_of_decoders(target.log.read_text(errors="replace")))
    return {
        "seed": campaign.seed,
        "requests": count,
        "elapsed_s": round(campaign.elapsed_s, 1),
        "outcomes": dict(campaign.outcomes.most_common()),
        "retried_for_overload": campaign.overloads,
        "slowest_answer_s": round(campaign.slowest_s, 2),
        "decoders_ended": dict(ends),
        f"memory_growth_since_{SETTLED}": _rounded(growth_of(campaign.memory)),
        "memory_checked": not memory_unchecked(count),
        "memory_growth_of_the_second_half": _rounded(growth_of(campaign.memory, count // 2)),
        "memory_mb": [
            [done, {role: round(held / 1e6, 1) for role, held in by_role.items()}]
            for done, by_role in campaign.memory[:: max(1, len(campaign.memory) // 20)]
        ],
        "mutations": dict(campaign.mutations.most_common()),
        "faults": campaign.faults,
        "wrong": wrong,
    }


def _rounded(growth: dict[str, float]) -> dict[str, float]:
    return {role: round(share, 4) for role, share in growth.items()}
