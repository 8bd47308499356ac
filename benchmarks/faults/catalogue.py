"""Every fault: how it is caused (above its yield), how it ends (below), and which requests it may fail."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import redis.asyncio as redis

from benchmarks.faults import hostile, isolation
from benchmarks.faults.invariants import DOWN, LOST, STOPPING, Harm
from benchmarks.faults.proxy import Way
from benchmarks.faults.world import MODELS, STOP_S, Gateway, World

Cause = Callable[[World, random.Random], contextlib.AbstractAsyncContextManager[Harm]]
BOTH = frozenset("ab")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault."""

    cause: Cause
    hold_s: tuple[float, float]  # how long it lasts, at least and at most
    needs_isolation: bool = False  # needs small disks of the campaign's own


CATALOGUE: dict[str, Kind] = {}
MOMENT = (0.0, 0.3)
WHILE = (1.0, 4.0)


def fault(name: str, hold_s: tuple[float, float], *, needs_isolation: bool = False) -> Callable[[Cause], Cause]:
    def enter(cause: Cause) -> Cause:
        CATALOGUE[name] = Kind(cause, hold_s, needs_isolation)
        return cause

    return enter


def some(world: World, rng: random.Random) -> Gateway:
    return world.gateways[rng.choice("ab")]


def only(gateway: Gateway) -> frozenset[str]:
    return frozenset({gateway.name})


# Processes that are killed.
@fault("gateway killed", MOMENT)
@asynccontextmanager
async def gateway_killed(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    await gateway.part.kill()
    yield Harm(f"gateway {gateway.name}", only(gateway), outcomes=LOST | DOWN, is_death=True, starts=True)
    gateway.start()


@fault("Triton killed", MOMENT)
@asynccontextmanager
async def triton_killed(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    kill(world.triton_pid(gateway.name), signal.SIGKILL)
    yield Harm(f"Triton of gateway {gateway.name}", only(gateway), is_death=True, starts=True)


@fault("model killed", MOMENT)
@asynccontextmanager
async def model_killed(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway, model = some(world, rng), rng.choice(MODELS)
    kill(pid_of(world, gateway, model), signal.SIGKILL)
    yield Harm(f"{model} of gateway {gateway.name}", only(gateway), frozenset({model}))


@fault("decoder killed", MOMENT)
@asynccontextmanager
async def decoder_killed(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    kill(chosen(world.decoders(gateway.name), rng), signal.SIGKILL)
    yield Harm(f"a decoder of gateway {gateway.name}")


@fault("Redis killed", WHILE)
@asynccontextmanager
async def redis_killed(world: World, _: random.Random) -> AsyncIterator[Harm]:
    await world.redis.kill()
    yield Harm("Redis", of_redis=True)
    world.redis.start()


# Processes that stand still.
@fault("gateway stopped", WHILE)
@asynccontextmanager
async def gateway_stopped(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    gateway.part.signal(signal.SIGSTOP)
    yield Harm(f"gateway {gateway.name}", only(gateway), outcomes=LOST | DOWN)
    gateway.part.signal(signal.SIGCONT)


@fault("Triton stopped", WHILE)
@asynccontextmanager
async def triton_stopped(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    pid = world.triton_pid(gateway.name)
    kill(pid, signal.SIGSTOP)
    yield Harm(f"Triton of gateway {gateway.name}", only(gateway))
    kill(pid, signal.SIGCONT)


@fault("model stopped", WHILE)
@asynccontextmanager
async def model_stopped(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway, model = some(world, rng), rng.choice(MODELS)
    pid = pid_of(world, gateway, model)
    kill(pid, signal.SIGSTOP)
    yield Harm(f"{model} of gateway {gateway.name}", only(gateway), frozenset({model}))
    kill(pid, signal.SIGCONT)


@fault("decoder stopped", WHILE)
@asynccontextmanager
async def decoder_stopped(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    pid = chosen(world.decoders(gateway.name), rng)
    kill(pid, signal.SIGSTOP)
    yield Harm(f"a decoder of gateway {gateway.name}")
    kill(pid, signal.SIGCONT)


@fault("Redis stopped", WHILE)
@asynccontextmanager
async def redis_stopped(world: World, _: random.Random) -> AsyncIterator[Harm]:
    world.redis.signal(signal.SIGSTOP)
    yield Harm("Redis", of_redis=True)
    world.redis.signal(signal.SIGCONT)


@fault("gateway told to end", MOMENT)
@asynccontextmanager
async def gateway_ended(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    """SIGTERM: what is in flight is answered, and the process ends with status 0."""
    gateway = some(world, rng)
    gateway.part.signal(signal.SIGTERM)
    ways = STOPPING | DOWN
    harm = Harm(f"gateway {gateway.name}", only(gateway), None, ways, spares_in_flight=True, is_death=True, starts=True)
    yield harm
    status = await gateway.part.ended(STOP_S)
    if status != 0:
        harm.problems.append(f"gateway {gateway.name} ended with status {status} after SIGTERM")
        await gateway.part.kill()
    gateway.start()


# What Redis does wrong.
@fault("Redis full", WHILE)
@asynccontextmanager
async def redis_full(world: World, _: random.Random) -> AsyncIterator[Harm]:
    async with redis.Redis(port=world.redis_port) as client:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1mb")
        yield Harm("Redis", of_redis=True)
        await client.config_set("maxmemory", "0")


@fault("Redis answers garbage", WHILE)
@asynccontextmanager
async def redis_garbage(world: World, _: random.Random) -> AsyncIterator[Harm]:
    world.redis_proxy.become(Way.GARBAGE)
    yield Harm("Redis", of_redis=True)
    world.redis_proxy.become(Way.PASSES)


@fault("Redis records replaced", WHILE)
@asynccontextmanager
async def records_replaced(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    """For a while every record becomes another's, a part of itself, or one with a changed byte."""
    stopped = asyncio.Event()

    async def replace() -> None:
        async with redis.Redis(port=world.redis_port) as client:
            while not stopped.is_set():
                names = await client.keys("glimpse:*:features:*")
                for name in names:
                    record = await client.get(name)
                    if record:
                        await client.set(name, damaged(record, await client.get(rng.choice(names)) or b"", rng))
                await asyncio.sleep(0.05)
            await client.flushdb()

    replacing = asyncio.create_task(replace())
    yield Harm("records in Redis", of_redis=True)
    stopped.set()
    await replacing


def damaged(record: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return another record, a part of this one, this one with other bytes, or no record at all."""
    at = rng.randrange(len(record))
    choices = (other, record[:at], record[:at] + rng.randbytes(8) + record[at + 8 :], rng.randbytes(200), b"")
    return rng.choice(choices)


@fault("Redis connections reset", MOMENT)
@asynccontextmanager
async def redis_reset(world: World, _: random.Random) -> AsyncIterator[Harm]:
    yield Harm(f"{world.redis_proxy.reset()} sides", of_redis=True)


# What lies between a gateway and its Triton.
@fault("Triton connections reset", WHILE)
@asynccontextmanager
async def triton_reset(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    """Sometimes once, sometimes for a while in which no new connection comes about."""
    cut = world.triton_proxy.reset()
    if rng.random() < 0.5:
        world.triton_proxy.become(Way.REFUSES)
    yield Harm(f"{cut} sides, {world.triton_proxy.way.value}", frozenset("b"))
    world.triton_proxy.become(Way.PASSES)


@fault("Triton connections freeze", WHILE)
@asynccontextmanager
async def triton_frozen(world: World, _: random.Random) -> AsyncIterator[Harm]:
    world.triton_proxy.become(Way.FREEZES)
    yield Harm("proxy", frozenset("b"))
    world.triton_proxy.become(Way.PASSES)


# What the system runs out of.
@fault("log disk full", WHILE, needs_isolation=True)
@asynccontextmanager
async def log_full(world: World, _: random.Random) -> AsyncIterator[Harm]:
    filler = isolation.fill(world.log_disk)
    yield Harm("gateway a")
    filler.unlink()


@fault("log reader stands still", WHILE)
@asynccontextmanager
async def log_slow(world: World, _: random.Random) -> AsyncIterator[Harm]:
    part = world.gateways["b"].part
    part.reads.clear()
    yield Harm("gateway b")
    part.reads.set()


@fault("shared memory full", WHILE, needs_isolation=True)
@asynccontextmanager
async def memory_full(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway = some(world, rng)
    filler = isolation.fill(world.shared_memory[gateway.name])
    yield Harm(f"gateway {gateway.name}")
    filler.unlink()


@fault("shared memory full, model killed", WHILE, needs_isolation=True)
@asynccontextmanager
async def memory_full_model_killed(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    gateway, model = some(world, rng), rng.choice(MODELS)
    filler = isolation.fill(world.shared_memory[gateway.name])
    kill(pid_of(world, gateway, model), signal.SIGKILL)
    yield Harm(f"{model} of gateway {gateway.name}", only(gateway), starts=True)
    filler.unlink()


@fault("no open files left", WHILE)
@asynccontextmanager
async def files_limited(world: World, rng: random.Random) -> AsyncIterator[Harm]:
    """The gateway cannot open anything; what it has open works. New connections to it fail."""
    gateway = some(world, rng)
    pid = gateway.part.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held // 2, before[1]))
    yield Harm(f"gateway {gateway.name}", only(gateway), outcomes=LOST)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


# Hostile callers.
def _hostile(caller: hostile.Hostile) -> Cause:
    @asynccontextmanager
    async def cause(world: World, rng: random.Random) -> AsyncIterator[Harm]:
        gateway = some(world, rng)
        harm = Harm(f"gateway {gateway.name}")
        async with caller(gateway.port, rng) as problems:
            harm.problems = problems
            yield harm

    return functools.wraps(caller)(cause)


for _name, _caller in hostile.CALLERS.items():
    fault(_name, WHILE)(_hostile(_caller))


def kill(pid: int | None, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone by now."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def pid_of(world: World, gateway: Gateway, role: str) -> int | None:
    return next((process.pid for process in world.of_triton(gateway.name) if process.role == role), None)


def chosen(pids: list[int], rng: random.Random) -> int | None:
    return rng.choice(sorted(pids)) if pids else None
