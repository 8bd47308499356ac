"""Size a fleet and simulate it: G gateways, V vision replicas, L LLM replicas, at 10 to 100,000 requests a second.

    python -m benchmarks.fleet      # -> build/bench/fleet.{json,png}, in five minutes

`needed` counts what a rate needs from the figures of a `Hardware`. `simulate` runs that fleet request by request: every
gateway has the served scheduler (service/admission/scheduler.py) with its share of the fleet's vision slots and LLM
rows, and one core. Replicas are chosen by the shorter of two random queues. docs/scaling.md explains the figures.

No fleet of this size was ever run. The figures of the gateway were measured on this project's CPU machines. Those of
the GPU are derived from published specifications, and each says how.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import simpy

from benchmarks.arguments import count
from benchmarks.bench.models import BUILD
from benchmarks.figures import tell
from service.admission.concurrency_limit import ConcurrencyLimit
from service.admission.contention import Contention
from service.admission.scheduler import Claim, Kind, Resource, Scheduler

RESULTS = Path(__file__).parent / "results"
RATES = (10, 1_000, 100_000)
SWEPT = 5_000  # requests a second; a fleet of a size at which some of each part can be taken away
LOADS = (0.5, 0.75, 1.0, 1.2, 1.35, 1.5, 1.7)  # of the rate that the fleet was sized for
SIMULATED_REQUESTS = 120_000  # most of one run; a lower rate is simulated for longer
WARM_UP = 0.25  # share of a run that is not counted
LONGEST_S = 120.0


@dataclass(frozen=True)
class Hardware:
    """What one of each part does. Times in seconds, sizes in bytes."""

    name: str = "H200, BLIP-2 OPT-2.7B with ViT-g/14, FP16"
    # Gateway, one core each: benchmarks/results/gateway_cpu.json of 2026-11-21 (measured, AMD EPYC).
    gateway_request_s: float = 2.3e-3
    gateway_image_s: float = 1.9e-3  # more for a new image: 4.2 ms in all
    gateway_token_s: float = 0.17e-3  # a streamed token; 0.011e-3 if the answer is not streamed
    # Vision: 521 GFLOP an image (benchmarks/results/real_scale.json) at 40 % of the published 989 TFLOP/s.
    encode_s: float = 0.521 / (0.40 * 989)
    attend_s: float = 0.013 / (0.40 * 989) + 0.2e-3  # Q-Former 13 GFLOP, and 0.2 ms of calls (assumed)
    encodes_at_once: int = 8  # images in one batch
    # LLM: 5.3 GB of weights a step at 60 % of the published 4.8 TB/s; 0.33 MB of keys and values a token and row.
    step_s: float = 5.3 / (0.60 * 4800)
    step_row_s: float = 120 * 0.33e-3 / (0.60 * 4800)
    prefill_s: float = 64 * 5.4e-3 / (0.40 * 989)  # 64 tokens of 5.4 GFLOP
    llm_rows: int = 64
    # Redis: features of one image, 257 x 1408 in FP16, and what one node carries (assumed: 10 Gbit/s, 64 GB).
    feature_bytes: float = 257 * 1408 * 2
    redis_bytes_s: float = 1.25e9
    redis_bytes: float = 64e9
    network_s: float = 0.5e-3  # one call between two machines (assumed)


@dataclass(frozen=True)
class Traffic:
    """What is asked. The shares are those of `benchmarks.simulate`."""

    new_images: float = 0.4  # share of the requests; the others are follow-ups
    other_gateway: float = 1.0  # share of follow-ups whose features lie in Redis: 0 if the balancer goes by image
    tokens: int = 16  # of a mean answer, geometrically distributed
    image_bytes: float = 200e3
    timeout_s: float = 10.0


@dataclass(frozen=True)
class Fleet:
    gateways: int
    vision: int  # replicas
    llm: int  # replicas
    redis: int  # nodes


@dataclass
class Measured:
    """The counted requests of one run."""

    first_token_s: list[float] = field(default_factory=list)
    follow_up_s: list[float] = field(default_factory=list)  # to the first token, of follow-ups only
    refused: int = 0
    asked: int = 0


def needed(rate: float, hardware: Hardware, traffic: Traffic, load: float = 0.7) -> Fleet:
    """Count the parts for `rate` requests a second if each may be busy for `load` of the time."""
    new = rate * traffic.new_images
    follow_ups = rate - new
    gateway_s = (
        rate * (hardware.gateway_request_s + traffic.tokens * hardware.gateway_token_s) + new * hardware.gateway_image_s
    )
    vision_s = new * (hardware.encode_s + hardware.attend_s) + follow_ups * hardware.attend_s
    rows = rate * llm_s(hardware, traffic.tokens, hardware.llm_rows)
    moved = new + follow_ups * traffic.other_gateway
    return Fleet(
        gateways=max(1, math.ceil(gateway_s / load)),
        vision=max(1, math.ceil(vision_s / load)),
        llm=max(1, math.ceil(rows / hardware.llm_rows / load)),
        redis=max(1, math.ceil(moved * hardware.feature_bytes / hardware.redis_bytes_s / load)),
    )


def llm_s(hardware: Hardware, tokens: int, rows: int) -> float:
    """How long an answer holds its row while `rows` rows are decoded together."""
    return hardware.prefill_s + tokens * (hardware.step_s + rows * hardware.step_row_s)


class Gateway:
    """One core, and the served scheduler with this gateway's share of the fleet."""

    def __init__(self, env: simpy.Environment, vision_slots: int, llm_rows: int) -> None:
        self.env = env
        self.core = simpy.Resource(env)
        self.limit = ConcurrencyLimit(vision_slots + llm_rows, Contention(math.inf))
        self.scheduler = Scheduler(vision_slots, llm_rows, limit=self.limit)
        self._grants: dict[Claim, simpy.Event] = {}

    def grant(self, claim: Claim) -> Generator[simpy.Event, bool, bool]:
        """Wait for the claim -> whether it was granted."""
        if self.scheduler.submit(claim, self.env.now) is not None:
            return False
        self._grants[claim] = grant = self.env.event()
        self._schedule()
        return (yield grant)

    def release(self, claim: Claim) -> None:
        self.scheduler.release(claim, self.env.now)
        self._schedule()

    def end(self, request: object, deadline: float, *, answered: bool) -> None:
        now = self.env.now
        self.limit.end(request, now, answered=answered, missed=now >= deadline)
        self._schedule()

    def _schedule(self) -> None:
        granted, expired = self.scheduler.schedule(self.env.now)
        for claims, is_granted in ((granted, True), (expired, False)):
            for claim in claims:
                self._grants.pop(claim).succeed(is_granted)


class Simulation:
    """One fleet under one load."""

    def __init__(self, fleet: Fleet, hardware: Hardware, traffic: Traffic, rate: float, seed: int = 0) -> None:
        self.env = env = simpy.Environment()
        self.hardware, self.traffic, self.rate = hardware, traffic, rate
        self.random = random.Random(seed)
        # A gateway may hold a little more than its share, so that one with more work can use what another leaves.
        slots = max(2, math.ceil(1.5 * fleet.vision * hardware.encodes_at_once / fleet.gateways))
        rows = max(2, math.ceil(1.5 * fleet.llm * hardware.llm_rows / fleet.gateways))
        self.gateways = [Gateway(env, slots, rows) for _ in range(fleet.gateways)]
        self.vision = [simpy.Resource(env) for _ in range(fleet.vision)]
        self.llm = [simpy.Resource(env, hardware.llm_rows) for _ in range(fleet.llm)]
        self.redis = [simpy.Resource(env) for _ in range(fleet.redis)]
        self.busy_s = dict.fromkeys(("gateways", "vision", "llm", "redis"), 0.0)  # of all replicas of a part together
        self.measured = Measured()
        self.counts_from = 0.0

    def run(self, seconds: float) -> Measured:
        self.counts_from = WARM_UP * seconds
        self.env.process(self._arrivals(seconds))
        self.env.run(seconds)
        return self.measured

    def utilisation(self, fleet: Fleet, seconds: float) -> dict[str, float]:
        """Share of the time in which each part was busy."""
        of = asdict(fleet) | {"llm": fleet.llm * self.hardware.llm_rows}
        return {part: round(self.busy_s[part] / seconds / of[part], 3) for part in self.busy_s}

    def _arrivals(self, seconds: float) -> Generator[simpy.Event, None, None]:
        while self.env.now < seconds:
            yield self.env.timeout(self.random.expovariate(self.rate))
            self.env.process(self._request())

    def _request(self) -> Generator[simpy.Event, Any, None]:
        """The request path: the gateway's core, a look, LLM tokens, an answer."""
        env, hardware, traffic, random = self.env, self.hardware, self.traffic, self.random
        begun, deadline, request = env.now, env.now + traffic.timeout_s, object()
        counts = begun >= self.counts_from
        is_new = random.random() < traffic.new_images
        tokens = 1 + int(math.log(1 - random.random()) / math.log(1 - 1 / traffic.tokens))
        gateway = random.choice(self.gateways)
        self.measured.asked += counts
        kind = Kind.SINGLE_IMAGE if is_new else Kind.FOLLOW_UP

        # The core writes tokens between other requests' work: their time is taken before the answer, in one piece.
        cpu_s = hardware.gateway_request_s + is_new * hardware.gateway_image_s + tokens * hardware.gateway_token_s
        yield from self._use("gateways", gateway.core, cpu_s)
        if is_new:
            claim = Claim(Resource.VISION, 1, kind, env.now, deadline, request=request)
            if not (yield from gateway.grant(claim)):
                self._refuse(gateway, request, deadline, counts)
                return
            yield from self._use("vision", self._shorter(self.vision), hardware.encode_s, hardware.network_s)
            gateway.release(claim)
            self.env.process(self._store())
        elif random.random() < traffic.other_gateway:
            node = random.choice(self.redis)
            yield from self._use("redis", node, hardware.feature_bytes / hardware.redis_bytes_s, hardware.network_s)
        claim = Claim(Resource.LLM, 1, kind, env.now, deadline, request=request)
        if not (yield from gateway.grant(claim)):
            self._refuse(gateway, request, deadline, counts)
            return
        yield from self._use("vision", self._shorter(self.vision), hardware.attend_s, hardware.network_s)
        replica = self._shorter(self.llm)
        with replica.request() as row:
            yield row
            rows = replica.count
            first_s = hardware.network_s + llm_s(hardware, 1, rows)
            rest_s = llm_s(hardware, tokens, rows) - llm_s(hardware, 1, rows)
            self.busy_s["llm"] += first_s + rest_s
            yield env.timeout(first_s)
            if counts:
                took_s = env.now - begun
                self.measured.first_token_s.append(took_s)
                if not is_new:
                    self.measured.follow_up_s.append(took_s)
            yield env.timeout(rest_s)
        gateway.release(claim)
        gateway.end(request, deadline, answered=True)

    def _store(self) -> Generator[simpy.Event, None, None]:
        """Write an image's features to Redis, after the answer does not need them any more."""
        yield from self._use(
            "redis", self.random.choice(self.redis), self.hardware.feature_bytes / self.hardware.redis_bytes_s
        )

    def _refuse(self, gateway: Gateway, request: object, deadline: float, counts: bool) -> None:
        self.measured.refused += counts
        gateway.end(request, deadline, answered=False)

    def _use(
        self, part: str, resource: simpy.Resource, seconds: float, before_s: float = 0.0
    ) -> Generator[simpy.Event, None, None]:
        """Wait for a unit of the resource and hold it."""
        if before_s:
            yield self.env.timeout(before_s)
        with resource.request() as turn:
            yield turn
            yield self.env.timeout(seconds)
        self.busy_s[part] += seconds

    def _shorter(self, replicas: list[simpy.Resource]) -> simpy.Resource:
        """The shorter queue of two random ones (Mitzenmacher 2001)."""
        first, second = self.random.choice(replicas), self.random.choice(replicas)
        return first if first.count + len(first.queue) <= second.count + len(second.queue) else second


def simulate(
    fleet: Fleet, hardware: Hardware, traffic: Traffic, rate: float, requests: int = SIMULATED_REQUESTS
) -> dict[str, Any]:
    """Simulate one load -> its figures, times in ms."""
    seconds = min(requests / rate, LONGEST_S)
    begun = time.process_time()
    simulation = Simulation(fleet, hardware, traffic, rate)
    gc.disable()  # the processes are no cycles, and there are many
    try:
        measured = simulation.run(seconds)
    finally:
        gc.enable()
    busy = simulation.utilisation(fleet, seconds)
    return {
        "requests_per_s": rate,
        "simulated_s": round(seconds, 2),
        "asked": measured.asked,
        "refused": measured.refused,
        "first_token_p50_ms": percentile(measured.first_token_s, 50),
        "first_token_p95_ms": percentile(measured.first_token_s, 95),
        "follow_up_p95_ms": percentile(measured.follow_up_s, 95),
        "busy": busy,
        "busiest": max(busy, key=busy.__getitem__),
        "cpu_s": round(time.process_time() - begun, 1),
    }


def percentile(seconds: list[float], share: float) -> float:
    return round(float(np.percentile(seconds, share)) * 1e3, 1) if seconds else math.nan


def bytes_per_s(rate: float, hardware: Hardware, traffic: Traffic) -> dict[str, float]:
    """What goes over the network, in all: from clients, between gateways and Triton, and to and from Redis."""
    new, follow_ups = rate * traffic.new_images, rate * (1 - traffic.new_images)
    return {
        "clients": new * traffic.image_bytes,
        "triton": (new + follow_ups) * hardware.feature_bytes,  # out after an encode, in before an attend
        "redis": (new + follow_ups * traffic.other_gateway) * hardware.feature_bytes,
        "redis_memory_of_an_hour": new * 3600 * hardware.feature_bytes,
    }


AS_IT_IS = Hardware(), Traffic()
TURNS = {  # what an operator can turn, and what it changes
    "as it is": AS_IT_IS,
    "balance by image": (Hardware(), Traffic(other_gateway=0.05)),
    "int8 features": (Hardware(feature_bytes=Hardware.feature_bytes / 2), Traffic()),
    "answers not streamed": (Hardware(gateway_token_s=0.011e-3), Traffic()),
}


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=count, default=SIMULATED_REQUESTS, help="most requests of one run")
    parser.add_argument("--out", type=Path, default=BUILD / "fleet.json", help="[build/bench/fleet.json]")
    return parser.parse_args(given)


def main() -> None:
    arguments = parsed()
    hardware, traffic = AS_IT_IS
    swept = needed(SWEPT, hardware, traffic)
    fewer = {part: replace(swept, **{part: math.ceil(0.75 * count)}) for part, count in asdict(swept).items()}
    figures = {
        "hardware": asdict(hardware),
        "traffic": asdict(traffic),
        "as_sized": {
            rate: {
                "needed": asdict(fleet := needed(rate, hardware, traffic)),
                "bytes_per_s": bytes_per_s(rate, hardware, traffic),
                **simulate(fleet, hardware, traffic, rate, arguments.requests),
            }
            for rate in RATES
        },
        "swept": asdict(swept),
        "by_load": [
            {"load": load, **simulate(swept, hardware, traffic, load * SWEPT, arguments.requests)} for load in LOADS
        ],
        "with_fewer": {
            part: simulate(fleet, hardware, traffic, SWEPT, arguments.requests) for part, fleet in fewer.items()
        },
        "what_to_turn": {name: asdict(needed(RATES[-1], *turned)) for name, turned in TURNS.items()},
    }
    tell(figures, arguments.out)
    draw(figures, arguments.out.with_suffix(".png"))


def draw(figures: dict[str, Any], out: Path) -> None:
    """Draw first-token times and how busy each part is, by load, and what fewer of each part do."""
    figure, (times, shares, less) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    runs, fleet = figures["by_load"], figures["swept"]
    loads = [100 * run["load"] for run in runs]
    for name, label in (
        ("first_token_p95_ms", "all, p95"),
        ("follow_up_p95_ms", "follow-ups, p95"),
        ("first_token_p50_ms", "all, p50"),
    ):
        times.plot(loads, [run[name] for run in runs], marker="o", label=label)
    times.set_yscale("log")
    times.set_ylabel("first token, ms")
    times.set_title(
        f"{SWEPT:,} requests/s: " + ", ".join(f"{count} {part}" for part, count in fleet.items()), fontsize=9
    )
    for part in fleet:
        shares.plot(loads, [100 * run["busy"][part] for run in runs], marker="o", label=part)
    shares.set_ylabel("busy, %")
    for axis in (times, shares):
        axis.set_xlabel("load, % of the rate it was sized for")
        axis.legend(fontsize=8)
    whole = next(run for run in runs if run["load"] == 1.0)
    found = {"nothing": whole} | figures["with_fewer"]
    less.bar(list(found), [run["first_token_p95_ms"] for run in found.values()])
    less.set_ylabel("first token p95, ms")
    less.set_title("p95 with up to a quarter fewer of one part", fontsize=9)
    less.set_xlabel("the part with fewer")
    for axis in (times, shares, less):
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
