"""Keep images in Redis, so that every gateway knows their ids.

    glimpse:1:image:{address}     the record: magic number, BLAKE3 of address and image, the image; kept for its time
    glimpse:1:images:deleted      sorted set: addresses of deleted images, and when; gateways forget them too

An address is a hash of the tenant and of an id with 128 random bits (`address_of` in service/media/store.py). So a
tenant, whatever id it sends, only ever reads what it put there. Whoever can read Redis itself can read the images.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from blake3 import blake3

from service.cache.redis_client import Command, Lane, RedisFault, Reply, granted
from service.cache.redis_tier import PREFIX, RedisTier
from service.system.watch import Watch
from service.telemetry.metrics import Metrics

MAGIC = b"GLI1"
DIGEST_BYTES = 32
TIMEOUT_S = 1.0  # for one image: up to 20 MB
INLINE_BYTES = 1_000_000  # a record up to this size is checked on the event loop: about 0.5 ms
LOOK_INTERVAL_S = 0.5  # a deleted image is forgotten everywhere at most so much later
OVERLAP_S = 30.0  # by which the gateways' clocks may differ
LATE_S = 60.0  # a deletion is remembered so much longer than an image that another gateway puts back late
MOST_DELETED = 50_000  # that Redis remembers, the latest: more than are deleted between two looks
MOST_UNWRITTEN_BYTES = 64 * 1024 * 1024
DELETED = f"{PREFIX}:images:deleted"
T = TypeVar("T")


def key_of(address: str) -> str:
    return f"{PREFIX}:image:{{{address}}}"


def record_of(address: str, data: bytes) -> bytes:
    return b"".join((*_head_of(address, data), data))


def image_in(record: bytes, address: str) -> bytes | None:
    """Return the record's image; None if it does not fit."""
    size = len(MAGIC) + DIGEST_BYTES
    with memoryview(record) as whole:
        fits = b"".join(_head_of(address, whole[size:])) == whole[:size]
    return record[size:] if fits else None


def _head_of(address: str, data: bytes | memoryview) -> tuple[bytes, bytes]:
    digest = blake3(address.encode())
    digest.update(data)
    return MAGIC, digest.digest()


async def _beside(nbytes: int, work: Callable[[], T]) -> T:
    """Do work on so many bytes: in a thread, if it would stop the event loop for long."""
    return work() if nbytes <= INLINE_BYTES else await asyncio.to_thread(work)


class SharedImages:
    """Usable while `run` runs. While Redis is not in use nothing is found and nothing is kept. Only `find` raises."""

    def __init__(self, url: str, tier: RedisTier, metrics: Metrics, ttl_s: float) -> None:
        self.forget: Callable[[str], object] = lambda _: None  # told the address of each image that another deleted
        self.is_deleted: Callable[[str], bool] = lambda _: False  # whether this gateway knows that it was deleted
        self._tier = tier
        self._metrics = metrics
        self._ttl_ms = max(1, round(ttl_s * 1e3))
        self._ttl_s = ttl_s
        self._reads = Lane(url, TIMEOUT_S)
        self._writes = Lane(url, TIMEOUT_S)
        self._behind: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._unwritten_bytes = 0
        self._looked_at = time.time()  # seconds since the epoch; this process knew no image before
        self._told: set[str] = set()  # deleted ones that `forget` knows

    @property
    def in_use(self) -> bool:
        return self._tier.in_use

    async def run(self) -> None:
        """Own the connections and all background work, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reads.run())
            tasks.create_task(self._writes.run())
            tasks.create_task(self._write_behind())
            watch = Watch("deleted images")
            while True:
                with watch.surviving():
                    await self.look()
                await asyncio.sleep(LOOK_INTERVAL_S)

    async def find(self, address: str) -> tuple[bytes, float] | None:
        """Return an image, and the seconds that it has left.

        A gateway that did not know of a deletion yet may have put the image back: it is not found, and deleted again.
        Raises RedisFault if Redis is in use and does not answer. If it refuses, nothing is found.
        """
        if not self.in_use:
            self._metrics.image_lookups.labels("redis", "skipped").inc()
            return None
        key = key_of(address)
        try:
            asked = ("ZSCORE", DELETED, address), ("GET", key), ("PTTL", key)
            deleted_at, record, left_ms = await self._ask(self._reads, *asked)
        except RedisFault as fault:
            self._metrics.image_lookups.labels("redis", "failed").inc()
            if fault.is_refusal:
                return None
            raise
        is_deleted = deleted_at is not None
        data = None
        if isinstance(record, bytes) and not is_deleted:
            data = await _beside(len(record), partial(image_in, record, address))
        if record is not None and data is None:
            if not is_deleted:
                self._metrics.redis_bad_records.labels("image").inc()
            with suppress(RedisFault):
                await self._ask(self._reads, ("UNLINK", key))
        self._metrics.image_lookups.labels("redis", "miss" if data is None else "hit").inc()
        return None if data is None else (data, max(0, int(left_ms)) / 1e3)

    async def put(self, address: str, data: bytes) -> bool:
        """Keep an image. Returns whether Redis has it now. One that was deleted is deleted again, and here too."""
        if self.is_deleted(address):
            return False
        key, record = key_of(address), await _beside(len(data), partial(record_of, address, data))
        try:
            asked = ("SET", key, record, "PX", self._ttl_ms), ("ZSCORE", DELETED, address)
            _, deleted_at = await self._ask(self._writes, *asked)
        except RedisFault:
            self._metrics.image_writes.labels("failed").inc()
            return False
        self._metrics.image_writes.labels("kept").inc()
        if deleted_at is not None or self.is_deleted(address):
            self.forget(address)
            with suppress(RedisFault):
                await self._ask(self._writes, ("UNLINK", key))
            return False
        return True

    def put_behind(self, address: str, data: bytes) -> None:
        """Keep an image in the background."""
        if not self.in_use:
            self._metrics.image_writes.labels("skipped").inc()
        elif self._unwritten_bytes + len(data) > MOST_UNWRITTEN_BYTES:
            self._metrics.image_writes.labels("dropped").inc()
        else:
            self._unwritten_bytes += len(data)
            self._behind.put_nowait((address, data))

    async def delete(self, address: str) -> bool | None:
        """Delete an image here and in every gateway. Returns whether it was there; None if Redis did not answer.

        The others are told in any case: one may have what Redis lacks. Callers can delete ids that never were, so only
        the latest MOST_DELETED are kept.
        """
        now = time.time()
        try:
            was_there, *_ = await self._ask(
                self._writes,
                ("UNLINK", key_of(address)),
                ("ZADD", DELETED, f"{now:.3f}", address),
                ("ZREMRANGEBYRANK", DELETED, 0, -MOST_DELETED - 1),
                ("ZREMRANGEBYSCORE", DELETED, "-inf", f"{now - self._ttl_s - LATE_S:.3f}"),
                ("PEXPIRE", DELETED, self._ttl_ms + round(LATE_S * 1e3)),
            )
        except RedisFault:
            return None
        return bool(was_there)

    async def look(self) -> None:
        """Forget what others deleted."""
        since, now = self._looked_at - OVERLAP_S, time.time()
        try:
            (addresses,) = await self._ask(self._reads, ("ZRANGEBYSCORE", DELETED, f"{since:.3f}", "+inf"))
        except RedisFault:
            return
        self._looked_at = now
        found = {address.decode() for address in addresses}
        for address in found - self._told:
            self.forget(address)
        self._told = found

    async def _write_behind(self) -> None:
        watch = Watch("images for Redis")
        while True:
            address, data = await self._behind.get()
            self._unwritten_bytes -= len(data)
            with watch.surviving():
                await self.put(address, data)

    async def _ask(self, lane: Lane, *commands: Command) -> list[Reply]:
        """Return Redis's replies. Raises RedisFault if it is not in use, does not answer, or refuses a command."""
        return [granted(reply) for reply in await self._tier.ask(lane, TIMEOUT_S, *commands)]
