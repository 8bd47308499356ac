"""Simulate the waits of a synthetic day under several scheduling policies.

    python -m benchmarks.simulate     # a million requests under each policy -> build/bench/scheduling.{json,png}

It runs the real scheduler with a simulated clock. Arrivals are Poisson; the rate is a sine over the day with 40 bursts
of 1 to 3 minutes at twice the rate. 60 % are follow-ups, 35 % have one new image, 5 % have four. Images hold vision
slots for ENCODE_S, and every answer holds LLM tokens until its last token. The demand is 48 % of the slots and 41 % of
the tokens on average, 84 % and 72 % at midday, and up to twice that in a burst. An answer has value for TIMEOUT_S.

| policy | meaning |
|---|---|
| `glimpse` | service/admission/scheduler.py as served |
| `text first`, `vision first` | the same with absolute priority instead of ageing |
| `fifo` | one queue in order of arrival, whose head blocks the others |

All policies drop a request as soon as it can no longer be answered in time.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from benchmarks.arguments import count
from benchmarks.bench.models import BUILD
from benchmarks.bench.orders import Fifo
from benchmarks.figures import tell
from service.admission.scheduler import Claim, Kind, Resource, Scheduler

DAY_S = 86_400
BURSTS = 40
VISION_SLOTS = 8
LLM_ROWS, LLM_TOKENS = 16, 16 * 320
ENCODE_S = 0.60
FIRST_TOKEN_S, TOKEN_S = 0.10, 0.022
TIMEOUT_S = 10.0
KINDS = tuple(Kind)
NEW_IMAGES = (0, 1, 4)  # by kind
SHARES = (0.60, 0.35, 0.05)
NEVER_S = 1e6  # a handicap that no waiting time makes up for

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Day:
    """One row per request, in order of arrival."""

    arrived: list[float]  # seconds of the day
    kind: list[int]  # index in KINDS
    tokens: list[int]
    llm_s: list[float]  # from the grant of its LLM tokens to the last token of the answer


@dataclass(frozen=True)
class Waits:
    """One row per request: seconds in queues, or NaN if its answer was not complete within TIMEOUT_S."""

    seconds: Floats
    cpu_s: float  # of the simulation


def synthetic_day(requests: int, seed: int) -> Day:
    random = np.random.default_rng(seed)
    minutes = np.arange(0, DAY_S, 60)
    rate = 1 + 0.75 * np.sin(2 * np.pi * (minutes / DAY_S - 0.25))
    for start in random.integers(0, len(minutes) - 3, BURSTS):
        rate[start : start + random.integers(1, 4)] *= 2
    passed = np.concatenate([[0], np.cumsum(rate)]) / rate.sum()
    arrived = np.interp(np.sort(random.random(requests)), passed, np.append(minutes, DAY_S))
    written = np.minimum(random.geometric(1 / 20, requests), 256)
    asked = np.where(random.random(requests) < 0.1, 512, 64)  # max_tokens: few requests set it
    tokens = np.maximum(32 + random.integers(8, 40, requests) + asked, LLM_TOKENS // LLM_ROWS)
    kind = random.choice(len(KINDS), requests, p=SHARES)
    llm_s = FIRST_TOKEN_S + TOKEN_S * np.minimum(written, asked)
    return Day(arrived.tolist(), kind.tolist(), tokens.tolist(), llm_s.tolist())


def scheduled(day: Day, scheduler: Scheduler) -> Waits:
    begun = time.process_time()
    waits: list[float] = [0.0] * len(day.arrived)
    owners: dict[Claim, tuple[int, float]] = {}  # request, start of its wait
    ends: list[tuple[float, int, Claim]] = []  # heap

    def submit(number: int, resource: Resource, now: float) -> None:
        kind, arrived = day.kind[number], day.arrived[number]
        amount = day.tokens[number] if resource is Resource.LLM else NEW_IMAGES[kind]
        claim = Claim(resource, amount, KINDS[kind], now, arrived + TIMEOUT_S, request=number, request_arrived=arrived)
        if scheduler.submit(claim, now) is None:
            owners[claim] = number, now
        else:
            leave(number, now, answered=False)

    def schedule(now: float) -> None:
        started, expired = scheduler.schedule(now)
        for claim in started:
            number, since = owners[claim]
            waits[number] += now - since
            held_s = day.llm_s[number] if claim.resource is Resource.LLM else ENCODE_S
            if now + held_s > claim.deadline:
                waits[number] = math.nan
            heapq.heappush(ends, (now + held_s, number, claim))
        for claim in expired:
            leave(owners.pop(claim)[0], now, answered=False)

    def leave(number: int, now: float, *, answered: bool) -> None:
        if not answered:
            waits[number] = math.nan
        scheduler.limit.end(number, now, answered=answered, missed=False)

    def end() -> None:
        now, number, claim = heapq.heappop(ends)
        del owners[claim]
        scheduler.release(claim, now)
        if claim.resource is Resource.VISION:
            submit(number, Resource.LLM, now)
        else:
            leave(number, now, answered=True)
        schedule(now)

    for number, (now, kind) in enumerate(zip(day.arrived, day.kind, strict=True)):
        while ends and ends[0][0] <= now:
            end()
        submit(number, Resource.VISION if NEW_IMAGES[kind] else Resource.LLM, now)
        schedule(now)
    while ends:
        end()
    return Waits(np.array(waits), time.process_time() - begun)


POLICIES: Mapping[str, Callable[[int, int], Scheduler]] = {
    "fifo": Fifo,
    "vision first": partial(Scheduler, handicap_s={kind: NEVER_S * (2 - i) for i, kind in enumerate(KINDS)}),
    "text first": partial(Scheduler, handicap_s={kind: NEVER_S * i for i, kind in enumerate(KINDS)}),
    "glimpse": Scheduler,
}


def summary(day: Day, waits: Waits) -> dict[str, object]:
    kinds = np.array(day.kind)
    rows = {}
    for i, kind in enumerate(KINDS):
        seconds = waits.seconds[kinds == i]
        kept = seconds[~np.isnan(seconds)]
        p50, p95, p99 = np.percentile(kept, [50, 95, 99]).round(3).tolist()
        rows[kind] = {
            "p50_s": p50,
            "p95_s": p95,
            "p99_s": p99,
            "longest_s": round(float(kept.max()), 3),
            "not_in_time": round(float(np.isnan(seconds).mean()), 5),
        }
    return {"simulated_in_cpu_s": round(waits.cpu_s, 1), "wait": rows}


def plot(day: Day, every: Mapping[str, Waits], path: Path) -> None:
    """Plot p95 of each half hour's waits (above) and the share of requests that wait longer (below)."""
    kinds, hours = np.array(day.kind), np.array(day.arrived) / 3600
    figure, axes = plt.subplots(2, len(KINDS), figsize=(15, 8), sharey="row", layout="constrained")
    for i, kind in enumerate(KINDS):
        above, below = axes[:, i]
        for (name, waits), style in zip(every.items(), (":", "-.", "--", "-"), strict=True):
            mine = kinds == i
            seconds = np.nan_to_num(waits.seconds[mine], nan=TIMEOUT_S)
            edges = np.searchsorted(hours[mine], np.arange(0.5, 24, 0.5))
            p95 = [np.percentile(part, 95) if len(part) else 0.0 for part in np.split(seconds, edges)]
            above.plot(np.arange(0.25, 24, 0.5), np.maximum(p95, 1e-3), style, label=name)
            ordered = np.sort(seconds)
            shown = np.unique(np.geomspace(1, len(ordered), 400).astype(int))
            below.plot(np.maximum(ordered[-shown], 1e-3), shown / len(ordered), style, label=name)
        above.set(title=kind.replace("_", " "), xlabel="hour of the day", yscale="log")
        below.set(xlabel="waits longer than [s]", xscale="log", yscale="log")
    axes[0, 0].set_ylabel("p95 of the wait [s]")
    axes[1, 0].set_ylabel("share of requests")
    axes[1, 0].set_ylim(1e-4, 1.5)
    axes[1, 2].legend()
    figure.suptitle(
        f"{len(day.arrived):,} requests of one day; a request without an answer counts as a wait of {TIMEOUT_S:g} s"
    )
    figure.savefig(path, dpi=110)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=count, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder of scheduling.json and .png [build/bench]")
    return parser.parse_args(given)


def main() -> None:
    arguments = parsed()
    day = synthetic_day(arguments.requests, arguments.seed)
    every = {name: scheduled(day, policy(VISION_SLOTS, LLM_TOKENS)) for name, policy in POLICIES.items()}
    result = {
        "requests": arguments.requests,
        "seed": arguments.seed,
        "policies": {name: summary(day, waits) for name, waits in every.items()},
    }
    tell(result, arguments.out / "scheduling.json")
    plot(day, every, arguments.out / "scheduling.png")


if __name__ == "__main__":
    main()
