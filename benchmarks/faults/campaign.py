"""Draw faults by seed, cause them one after the other under load, and record what comes of it."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.bench.scenes import Scenes
from benchmarks.faults.catalogue import CATALOGUE, Kind
from benchmarks.faults.clients import OK, TIMEOUT_S, Asker, Client, Entry, Images, Ledger, Question, pool_of
from benchmarks.faults.invariants import SETTLE_S, Episode, Probe, Records, patience_of
from benchmarks.faults.world import START_S, Gateway, World

SCENES = 6
CLIENTS = 2  # of each gateway
PROBE_S = 0.2  # between two questions whether a gateway is ready
PROBE_TIMEOUT_S = 1.5
LOOK_S = 0.1  # between two looks whether all is well again
GIVE_UP_S = 60.0  # without a recovery: everything is started again
MOST_TIMEOUT_S = 30.0  # of a request on a busy machine
CALM_S = 3.0  # of load before the first fault and after the last
HELD = re.compile(
    r"^(glimpse_(?:admitted_cost|requests_waiting|requests_running|resource_used|requests_in_flight)\S*) (\S+)$", re.M
)
REDIS_IN_USE = "glimpse_redis_breaker_open 0.0"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A fault that will be caused."""

    number: int
    kind: str
    hold_s: float

    def rng(self, seed: int) -> random.Random:
        """Return the source of the fault's own choices, which depend on no other fault's."""
        return random.Random(f"{seed}:{self.number}")


def draw(seed: int, count: int, kinds: Iterable[tuple[str, Kind]]) -> list[Drawn]:
    """Draw `count` faults. Every kind comes equally often, as from a deck that is shuffled again when it is empty."""
    rng = random.Random(seed)
    known = dict(kinds)
    deck: list[str] = []
    drawn = []
    for number in range(count):
        if not deck:
            deck = sorted(known)
            rng.shuffle(deck)
        kind = deck.pop()
        drawn.append(Drawn(number, kind, round(rng.uniform(*known[kind].hold_s), 2)))
    return drawn


class Campaign:
    """One run."""

    def __init__(self, seed: int, world: World, say: Callable[[str], None] = sys.stderr.write) -> None:
        self._seed = seed
        self._world = world
        self._say = say
        self._scenes = Scenes.load(SCENES)
        self._pool = pool_of(self._scenes)
        self._undisturbed: dict[Question, str] = {}
        self._ledger = Ledger()
        self._probes: list[Probe] = []
        self._episodes: list[Episode] = []
        self._checks: list[Entry] = []
        self._checkers = {name: Asker(name, gateway.port, self._scenes) for name, gateway in world.gateways.items()}
        self._fresh = iter(range(10_000_000, 20_000_000))  # images of checks, which no client sends
        self._patience = 1.0
        self.began = 0.0

    async def run(self, faults: Sequence[Drawn]) -> Records:
        """Cause the faults -> everything that was recorded. Raises RuntimeError if the world does not start."""
        await self._start()
        self.began = time.monotonic()
        ended = asyncio.Event()
        rng = random.Random(f"{self._seed}:clients")
        images = Images(self._scenes, rng)
        askers = [
            Asker(name, gateway.port, self._scenes)
            for name, gateway in self._world.gateways.items()
            for _ in range(CLIENTS)
        ]
        for asker in (*askers, *self._checkers.values()):
            asker.timeout_s = min(TIMEOUT_S * self._patience, MOST_TIMEOUT_S)
        async with asyncio.TaskGroup() as tasks:
            probing = [tasks.create_task(self._probe(gateway)) for gateway in self._world.gateways.values()]
            for asker in askers:
                tasks.create_task(Client(asker, self._pool, images, self._ledger, rng).run(ended))
            await asyncio.sleep(CALM_S)
            for fault in faults:
                await self._cause(fault, len(faults))
            await asyncio.sleep(CALM_S)
            ended.set()
            while self._ledger.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            for task in probing:
                task.cancel()
        for asker in (*askers, *self._checkers.values()):
            asker.close()
        leftovers = [*self._held(), *await self._world.stop()]
        starts = {name: gateway.starts for name, gateway in self._world.gateways.items()}
        return Records(
            self._ledger.entries,
            self._episodes,
            self._probes,
            starts,
            self._undisturbed,
            leftovers,
            time.monotonic(),
            self._checks,
            self._patience,
        )

    async def _start(self) -> None:
        """Wait until all is ready, and record the undisturbed answers: a gateway's must equal the other's."""
        began = time.monotonic()
        deadline = began + START_S
        while not all([await self._is_ready(gateway) for gateway in self._world.gateways.values()]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateways are not ready within {START_S:g} s: see {self._world.folder}")
            await asyncio.sleep(LOOK_S)
        start_s = time.monotonic() - began
        self._patience = patience_of(start_s)
        self._say(f"everything has started in {start_s:.1f} s: limits times {self._patience:g}\n")
        for question in self._pool:
            answers = set()
            for name, checker in self._checkers.items():
                for kind in ("new", "follow_up"):
                    entry = Entry(name, kind, question, False, time.monotonic())
                    await checker.ask(entry, question.scene)
                    if entry.outcome != OK:
                        raise RuntimeError(f"gateway {name} answers {entry.outcome} before the first fault")
                    answers.add(entry.answer)
            if len(answers) != 1:
                raise RuntimeError(f"undisturbed answers differ: {question} -> {answers}")
            self._undisturbed[question] = answers.pop()

    async def _cause(self, fault: Drawn, of: int) -> None:
        tritons = self._tritons()
        begun = time.monotonic()
        async with CATALOGUE[fault.kind].cause(self._world, fault.rng(self._seed)) as harm:
            episode = Episode(fault.number, fault.kind, harm, begun)
            await asyncio.sleep(fault.hold_s)
        episode.healed = time.monotonic()
        episode.recovered = await self._recovered(episode.healed + GIVE_UP_S * self._patience, with_redis=harm.of_redis)
        episode.restarted = frozenset(name for name, pid in self._tritons().items() if pid != tritons[name])
        self._episodes.append(episode)
        if episode.recovered is None:
            await self._start_again()
        took = "never" if episode.recovered is None else f"{episode.recovered - episode.healed:.2f} s"
        restarted = f", restarted: Triton of {', '.join(sorted(episode.restarted))}" if episode.restarted else ""
        self._say(
            f"{begun - self.began:7.1f} s  {fault.number + 1}/{of} {fault.kind}: {harm.target}, "
            f"held {fault.hold_s:g} s, recovered after {took}{restarted}\n"
        )
        await asyncio.sleep(SETTLE_S)

    async def _recovered(self, deadline: float, *, with_redis: bool) -> float | None:
        """Wait until every gateway is ready and answers both kinds of question -> when it was so.

        After a fault of Redis they must use it again. On a busy machine they leave it now and then for other reasons.
        """
        waiting = dict(self._world.gateways)
        while waiting:
            for name, gateway in list(waiting.items()):
                if await self._is_well(gateway, with_redis=with_redis):
                    del waiting[name]
            if waiting:
                if time.monotonic() > deadline:
                    return None
                await asyncio.sleep(LOOK_S)
        return time.monotonic()

    async def _is_well(self, gateway: Gateway, *, with_redis: bool) -> bool:
        if not await self._is_ready(gateway):
            return False
        if with_redis and REDIS_IN_USE not in (await asyncio.to_thread(gateway.get, "/metrics"))[1]:
            return False
        checker = self._checkers[gateway.name]
        image = next(self._fresh)
        question = self._pool[4 * (image % SCENES)]
        for kind in ("new", "follow_up"):
            entry = await checker.ask(Entry(gateway.name, kind, question, False, time.monotonic()), image)
            if entry.outcome != OK or entry.answer != self._undisturbed[question]:
                return False
            self._checks.append(entry)
        return True

    async def _is_ready(self, gateway: Gateway) -> bool:
        status, _ = await asyncio.to_thread(gateway.get, "/health/ready")
        return status == 200

    async def _probe(self, gateway: Gateway) -> None:
        """Ask whether the gateway is ready, again and again, as a load balancer does."""
        while True:
            sent = time.monotonic()
            status, _ = await asyncio.to_thread(gateway.get, "/health/ready", PROBE_TIMEOUT_S)
            self._probes.append(Probe(gateway.name, sent, time.monotonic(), status))
            await asyncio.sleep(PROBE_S)

    async def _start_again(self) -> None:
        """Replace every part after a fault from which the world did not recover."""
        world = self._world
        parts = [*(gateway.part for gateway in world.gateways.values()), world.triton, world.redis]
        for part in parts:
            await part.kill()
        world.redis.start()
        world.triton.start()
        for gateway in world.gateways.values():
            gateway.start()
        await self._recovered(time.monotonic() + GIVE_UP_S * self._patience, with_redis=False)

    def _tritons(self) -> dict[str, int | None]:
        return {name: self._world.triton_pid(name) for name in self._world.gateways}

    def _held(self) -> list[str]:
        """Return what gateways hold for requests although none is in flight."""
        found = []
        for gateway in self._world.gateways.values():
            _, metrics = gateway.get("/metrics")
            found += [f"gateway {gateway.name}: {name} is {value}" for name, value in HELD.findall(metrics)
                      if float(value)]  # fmt: skip
        return found
