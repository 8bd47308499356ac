"""Inspect and purge the features in Redis, for `glimpse cache`.

Everything raises RedisFault, and ValueError for a URL that is not the address of a Redis.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.cache.keys import AS_INT8
from service.cache.redis_client import Lane, granted, primaries

PATTERN = "glimpse:*:features:{*}"  # of every format version
TIMEOUT_S = 5.0  # for one pipeline; an operator waits for it
SCAN_COUNT = 500


@dataclass(slots=True)
class Kept:
    """The records of one vision encoder."""

    records: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class Stats:
    """Totals of one Redis, or of all nodes of a cluster."""

    version: str = ""  # of Redis
    used_bytes: int = 0  # by everything in Redis
    max_bytes: int = 0  # 0: no limit
    policy: str = ""  # what Redis does at the limit
    evicted_keys: int = 0  # since Redis started
    kept: dict[str, Kept] = field(default_factory=lambda: defaultdict(Kept))  # by encoder fingerprint


async def stats(url: str) -> Stats:
    found = Stats()
    for node in await primaries(url):
        async with opened(node) as lane:
            asked = await lane.ask(("INFO", "server"), ("INFO", "memory"), ("INFO", "stats"))
            server, memory, counts = map(granted, asked)
            found.version, found.policy = server["redis_version"], memory["maxmemory_policy"]
            found.used_bytes += memory["used_memory"]
            found.max_bytes += memory["maxmemory"]
            found.evicted_keys += counts["evicted_keys"]
            async for keys in record_keys(lane):
                for key, nbytes in zip(keys, await lane.ask(*(("STRLEN", key) for key in keys)), strict=True):
                    kept = found.kept[fingerprint_of(key)]
                    kept.records += 1
                    kept.nbytes += granted(nbytes)
    return found


async def purge(url: str, fingerprint: str | None) -> int:
    """Delete all records, or those of one vision encoder. Returns the number of deleted records."""
    deleted = 0
    for node in await primaries(url):
        async with opened(node) as lane:
            async for keys in record_keys(lane):
                doomed = [key for key in keys if fingerprint is None or is_of(key, fingerprint)]
                deleted += sum(map(granted, await lane.ask(*(("UNLINK", key) for key in doomed)))) if doomed else 0
    return deleted


def fingerprint_of(key: bytes) -> str:
    return key.decode(errors="replace").partition("{")[2].rsplit(":", 2)[0]


def is_of(key: bytes, fingerprint: str) -> bool:
    """An encoder's fingerprint matches its int8 features too."""
    found = fingerprint_of(key)
    return fingerprint in (found, found.removesuffix(AS_INT8))


async def record_keys(lane: Lane) -> AsyncIterator[list[bytes]]:
    """Yield some hundred keys at a time, each key once. SCAN does not block Redis for other clients."""
    seen: set[bytes] = set()
    cursor = 0
    while True:
        cursor, keys = granted(*await lane.ask(("SCAN", cursor, "MATCH", PATTERN, "COUNT", SCAN_COUNT)))
        if new := [key for key in dict.fromkeys(keys) if key not in seen]:
            seen.update(new)
            yield new
        if not cursor:
            return


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Lane]:
    lane = Lane(url, TIMEOUT_S)
    running = asyncio.create_task(lane.run())
    try:
        yield lane
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
