"""Time operations of the gateway's tables in this process, each with so many entries.

10^5 images would take an hour of encodes and 17 GB of features. So the entries here hold small arrays, which all of
them share: what is measured is the table with its counters, as the gateway uses it, and not the encoder.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.growth.curves import Curve, Figures, Found, percentile, schedule, steps
from benchmarks.growth.served import tell_point
from service.access.keys import KeyRecord, Keyring, new_key
from service.access.windows import Windows
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.cache.features import FeatureCache
from service.cache.keys import FeatureKey, first_view
from service.cache.visual_tokens import ENTRY_BYTES, VisualCache
from service.core.access import Scope
from service.core.request import Budget
from service.core.vision import Relevance, Seen, VisionFeatures
from service.media.store import Image, ImageStore
from service.settings import IMAGE_ENTRY_BYTES
from service.telemetry.metrics import Metrics

OPERATIONS = 2000  # of a point and round
WARM_UP = 100
FAR = 1e9  # seconds until a deadline that does not matter
FLOATS = np.zeros((1, 8), np.float32)
FEATURES = VisionFeatures(FLOATS, FLOATS, FLOATS, FLOATS)
SEEN = Seen(FLOATS, Relevance(FLOATS, FLOATS, np.zeros((1, 1), np.int32), FLOATS), Budget())


@dataclass(frozen=True, slots=True)
class Table:
    """A full table, what each operation on it is given, and the operation. Only the operation is timed."""

    given: Iterator[Any]
    operate: Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess(Curve):
    fill: Callable[[int], Awaitable[Table]]


def feature_key(number: int) -> FeatureKey[VisionFeatures]:
    return first_view("benchmark", f"{number:064x}")


async def encoded(features: VisionFeatures) -> asyncio.Task[VisionFeatures]:
    """Return an encode that has ended."""
    task = asyncio.create_task(asyncio.sleep(0, features))
    await task
    return task


async def feature_cache(entries: int) -> FeatureCache:
    """Return a cache that is full with so many."""
    cache = FeatureCache(entries * FEATURES.nbytes, Metrics())
    for number in range(entries):
        async with cache.find(feature_key(number)) as found:
            found.expect(await encoded(VisionFeatures(FLOATS, FLOATS, FLOATS, FLOATS)))
    return cache


async def features_get(entries: int) -> Table:
    cache = await feature_cache(entries)

    async def get(key: FeatureKey[VisionFeatures]) -> None:
        async with cache.find(key) as found:
            require(found.features is not None)

    return Table(map(feature_key, any_of(range(entries))), get)


async def features_put(entries: int) -> Table:
    cache, ended = await feature_cache(entries), await encoded(FEATURES)

    async def put(key: FeatureKey[VisionFeatures]) -> None:
        async with cache.find(key) as found:
            found.expect(ended)
        require(len(cache) == entries)

    return Table(map(feature_key, itertools.count(entries)), put)


def visual_key(number: int) -> bytes:
    return f"{number:0200}".encode()


def visual_cache(entries: int) -> VisualCache:
    cache = VisualCache(entries * (SEEN.nbytes + len(visual_key(0)) + ENTRY_BYTES), Metrics())
    for number in range(entries):
        cache.keep(visual_key(number), SEEN)
    return cache


async def visual_get(entries: int) -> Table:
    cache = visual_cache(entries)

    async def get(key: bytes) -> None:
        require(cache.get(key) is not None)

    return Table(map(visual_key, any_of(range(entries))), get)


async def visual_put(entries: int) -> Table:
    cache = visual_cache(entries)

    async def put(key: bytes) -> None:
        cache.keep(key, SEEN)
        require(len(cache) == entries)

    return Table(map(visual_key, itertools.count(entries)), put)


def names(tenants: int) -> list[str]:
    return [f"tenant-{number}" for number in range(tenants)]


async def image_store(tenants: int) -> Table:
    """Each tenant holds one small image, and the store is full: a new image pushes another out."""
    known = names(tenants)
    store = ImageStore(tenants * (1 + IMAGE_ENTRY_BYTES), FAR)
    numbers = itertools.count()

    def image() -> Image:
        number = next(numbers)
        return Image(b"-", f"{number:064x}", f"img_{number:032x}")

    for name in known:
        store.put(image(), 0.0, name)

    async def put(sent: tuple[Image, str]) -> None:
        store.put(sent[0], 0.0, sent[1])
        require(len(store) == tenants)

    return Table(((image(), name) for name in any_of(known)), put)


async def keyring(tenants: int) -> Table:
    known = [new_key() for _ in range(tenants)]
    scopes = frozenset({Scope.ASK})
    records = [KeyRecord(key_id, digest, f"tenant-{key_id}", scopes, 0.0) for _, key_id, digest in known]
    ring = Keyring.of(records, {})

    async def grant(key: str) -> None:
        ring.grant(key, 0.0)

    return Table(any_of([key for key, _, _ in known]), grant)


async def quotas(tenants: int) -> Table:
    windows = Windows()
    known = names(tenants)
    for name in known:
        await windows.hit(name, "requests", 10**9, 1)

    async def hit(name: str) -> None:
        require((await windows.hit(name, "requests", 10**9, 1)).fits)

    return Table(any_of(known), hit)


async def queue(tenants: int) -> Table:
    """A claim of each tenant waits for the one slot. It is given back and granted, and the tenant claims it again."""
    scheduler, numbers = Scheduler(1, 1), itertools.count()

    def claim(tenant: str) -> Claim:
        number = float(next(numbers))
        return Claim(Resource.LLM, 1, Kind.FOLLOW_UP, number, FAR, tenant, request_arrived=number)

    for name in names(tenants + 1):
        require(scheduler.submit(claim(name), 0.0) is None)
    granted = scheduler.schedule(0.0)[0]

    async def turn(_: int) -> None:
        ended = granted.pop()
        scheduler.release(ended, 0.0, finished=False)
        granted.extend(scheduler.schedule(0.0)[0])
        require(len(granted) == 1 and scheduler.submit(claim(ended.tenant), 0.0) is None)

    return Table(itertools.count(), turn)


def any_of(known: Sequence[Any]) -> Iterator[Any]:
    drawn = random.Random(0)
    return (drawn.choice(known) for _ in itertools.count())


def require(holds: bool) -> None:
    if not holds:
        raise RuntimeError("the table did not do what is measured")


async def spend(table: Table) -> Figures:
    """Take the CPU time of each operation alone -> figures. Other load on the machine distorts it little."""
    took_us = []
    for number, given in enumerate(itertools.islice(table.given, WARM_UP + OPERATIONS)):
        began = time.thread_time_ns()
        await table.operate(given)
        if number >= WARM_UP:
            took_us.append((time.thread_time_ns() - began) / 1e3)
    return {"p50_us": percentile(took_us, 0.5), "p95_us": percentile(took_us, 0.95)}


CACHE_SIZES = steps(100, 100_000, 7)
TENANT_SIZES = steps(1, 10_000, 5)
CONSTANT = {"p50_us": 0, "p95_us": 0}
CURVES = (
    *(
        InProcess(axis="cache_entries", name=name, sizes=CACHE_SIZES, counted="entries of the cache", causes=CONSTANT,
                  holds="small arrays, in this process without HTTP and Triton", fill=fill)
        for name, fill in (("feature cache: find a known image", features_get),
                           ("feature cache: keep a new one, evict", features_put),
                           ("visual tokens: find", visual_get),
                           ("visual tokens: keep, evict", visual_put))
    ),
    *(
        InProcess(axis="tenant_tables", name=name, sizes=TENANT_SIZES, counted="tenants", causes=CONSTANT,
                  holds="one entry a tenant, in this process without HTTP and Triton", fill=fill)
        for name, fill in (("full image store: keep, evict", image_store), ("key: check", keyring),
                           ("quota: charge a request", quotas))
    ),
    InProcess(axis="waiting_tenants", name="queue: grant, claim again", sizes=steps(1, 512, 10),
              counted="tenants that wait", causes={"p50_us": 1, "p95_us": 1},
              holds="one slot, one claim a tenant, in this process", fill=queue),
)  # fmt: skip


async def measure(curves: Sequence[InProcess], rounds: int, seed: int) -> dict[tuple[str, str], Found]:
    """Measure all points of these curves -> figures by curve, size and round. Tables stay full from round to round."""
    found: dict[tuple[str, str], Found] = {curve.key: {size: [] for size in curve.sizes} for curve in curves}
    tables: dict[tuple[tuple[str, str], int], Table] = {}
    for curve, size in schedule(curves, rounds, seed):
        if (curve.key, size) not in tables:
            tables[curve.key, size] = await curve.fill(size)
        figures = await spend(tables[curve.key, size])
        found[curve.key][size].append(figures)
        tell_point(curve, size, figures)
    return found
