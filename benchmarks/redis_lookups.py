"""Measure the time that Redis adds to a request, for hits and misses, by record size.

    python -m benchmarks.redis_lookups          # starts its own redis-server; needs one on PATH

Times are those that a request waits, with the gateway's own code on uvloop. A miss takes two round trips: the record,
and the claim to encode it. In the busy rows, 16 requests ask for different images at the same time.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import uvloop

from benchmarks.ports import free_ports
from service.cache.keys import FeatureKey
from service.cache.records import pack, unpack
from service.cache.redis_tier import RedisLimits, RedisTier
from service.core.card import ModelCard
from service.core.vision import VisionFeatures
from service.settings import PROJECT
from service.telemetry.metrics import Metrics

WIDTHS = {"reference": None, "ViT-B/14": 768, "ViT-g/14": 1408}  # None: the served model's width
LOOKUPS = 1_000
BUSY = 16
START_S = 10.0  # of redis-server


def key(number: int) -> FeatureKey:
    return FeatureKey("benchmark", 224, f"{number:064x}")


def features(card: ModelCard) -> VisionFeatures:
    random = np.random.default_rng(0)
    return VisionFeatures(*(random.standard_normal(s, np.float32) for s in card.feature_shapes[224].values()))


@contextmanager
def redis_server() -> Iterator[str]:
    (port,) = free_ports(1)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def measure(name: str, card: ModelCard, url: str) -> None:
    """Print the times of one model's records. Raises TimeoutError if Redis does not answer."""
    tier = RedisTier(url, RedisLimits(timeout_s=5.0, flight_s=0.001, ttl_s=600.0), card.feature_shapes, Metrics())
    running = asyncio.create_task(tier.run())
    async with asyncio.timeout(START_S):
        while tier.breaker.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    vision = features(card)
    record = pack(key(0), vision)
    print(f"{name}: {len(record) / 1e3:.0f} KB")
    packing = [timed(lambda: pack(key(0), vision)) for _ in range(200)]
    unpacking = [timed(lambda: unpack(record, key(0), card.feature_shapes)) for _ in range(200)]
    print(f"  pack {np.median(packing) * 1e3:.2f} ms, unpack and check {np.median(unpacking) * 1e3:.2f} ms")
    for number in range(BUSY):
        tier.put(key(number), vision)
    for number in range(BUSY):
        while await tier.find(key(number), 0.0) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    new = itertools.count(1_000_000)
    for what, least, numbers in (("hit", True, itertools.cycle(range(BUSY))), ("miss", False, new)):
        alone = [await lookup(tier, next(numbers), least) for _ in range(LOOKUPS)]
        busy: list[float] = []
        for _ in range(LOOKUPS // BUSY):
            busy += await asyncio.gather(*(lookup(tier, next(numbers), least) for _ in range(BUSY)))
        for how, seconds in (("alone", alone), (f"{BUSY} at once", busy)):
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            print(f"  {what}, {how}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def lookup(tier: RedisTier, number: int, hits: bool) -> float:
    begun = time.perf_counter()
    found = await tier.find(key(number), math.inf if hits else 0.0)
    seconds = time.perf_counter() - begun
    if (found is not None) != hits:
        raise RuntimeError(f"the lookup should have been a {'hit' if hits else 'miss'}")
    return seconds


def timed(call: object) -> float:
    assert callable(call)
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


async def main() -> None:
    served = ModelCard.from_json((PROJECT / "model_repository" / "card.json").read_text())
    for name, width in WIDTHS.items():
        with redis_server() as url:
            await measure(name, replace(served, vision_width=width or served.vision_width), url)


if __name__ == "__main__":
    uvloop.run(main())
