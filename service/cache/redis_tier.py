"""Vision features that gateways share: what one has encoded the others find in Redis, and one image is encoded once.

Whatever Redis does, it costs a request `timeout_s` at most. Then, and while the breaker is open, the request goes on as
if there were no Redis. What it waits for another gateway's encode is bounded apart, by `flight_s`. Nothing here raises.

The keys of one image share a Redis Cluster slot, as only what stands in braces is hashed:

    glimpse:1:features:{encoder fingerprint:view:blake3 of the image}    the record, kept for `ttl_s`
    glimpse:1:flight:{encoder fingerprint:view:blake3 of the image}      the gateway that encodes it, for `flight_s`
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

import structlog

from service.cache.breaker import Breaker
from service.cache.keys import FeatureKey, Features
from service.cache.records import VERSION, RecordError, pack, unpack
from service.cache.redis_client import Command, Lane, RedisFault, Reply, granted, is_cluster
from service.core.card import ModelCard
from service.metrics import Metrics

log = structlog.get_logger()

LANE_TIMEOUT_S = 1.0  # then a connection counts as lost; requests have gone on long before
MOST_UNWRITTEN = 64  # records that wait to be written: 370 MB, were all of them the largest encoder's closer views
MOST_UNRELEASED = 1024  # claims that wait to be given back; any more end by themselves after `flight_s`
INLINE_PACK_BYTES = 256 * 1024  # above this a record is made in a thread: 1.5 MB take 1 ms
POLL_S = 0.01  # between two looks for what another gateway encodes
GAUGE_INTERVAL_S = 5.0

PREFIX = f"glimpse:{VERSION}"
TRIAL_KEY = f"{PREFIX}:trial"  # never written
# A claim that ran out may be another gateway's by now.
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


def record_key(key: FeatureKey[Any]) -> str:
    return f"{PREFIX}:features:{{{key.fingerprint}:{key.view}:{key.digest}}}"


def flight_key(key: FeatureKey[Any]) -> str:
    return f"{PREFIX}:flight:{{{key.fingerprint}:{key.view}:{key.digest}}}"


@dataclass(frozen=True, slots=True)
class RedisLimits:
    timeout_s: float  # what Redis may cost one request
    flight_s: float  # how long one gateway waits for another's encode, and how long a claim to encode lasts
    ttl_s: float  # how long a record is kept


class RedisTier:
    """Usable while `run` runs. Before, and while Redis is away, nothing is found and nothing is kept."""

    def __init__(self, url: str, limits: RedisLimits, card: ModelCard, metrics: Metrics) -> None:
        self.limits = limits
        self.breaker = Breaker()
        self._card = card
        self._is_cluster = is_cluster(url)  # no node of which can tell of all
        self._metrics = metrics
        self._me = secrets.token_hex(8)
        self._claimed: set[FeatureKey[Any]] = set()  # by callers who have not put it yet, nor given up
        self._lookups = Lane(url, LANE_TIMEOUT_S)
        self._writes = Lane(url, LANE_TIMEOUT_S)  # its own: a write never delays a lookup
        self._behind: asyncio.Queue[tuple[FeatureKey[Any], Any]] = asyncio.Queue(MOST_UNRELEASED)
        self._opened = asyncio.Event()
        self._opened.set()
        self._reason = ""  # why Redis is of no use, as last logged
        self._evicted: int | None = None  # by Redis since it started, as last heard
        metrics.redis_breaker_open.set(1)

    async def run(self) -> None:
        """Owns the connections and all that goes on behind requests, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lookups.run())
            tasks.create_task(self._writes.run())
            tasks.create_task(self._write_behind())
            tasks.create_task(self._try_again())
            if not self._is_cluster:
                tasks.create_task(self._gauge())

    async def find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """What is kept, or what another gateway brings within `patience_s`.

        None: the caller encodes, and says `put` or `give_up` when it has.
        """
        if self.breaker.is_open:
            self._count("skipped")
            return None
        with self._metrics.redis_lookup.time():
            try:
                return await self._find(key, min(patience_s, self.limits.flight_s))
            except RedisFault as fault:
                self._failed(fault)
                self._count("failed")
                return None

    async def _find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """Raises RedisFault."""
        now = asyncio.get_running_loop().time
        deadline = now() + self.limits.timeout_s
        (record,) = await self._ask(deadline - now(), ("GET", record_key(key)))
        if (features := await self._believe(record, key, deadline - now())) is not None:
            self._count("hit")
            return features
        ours, features = await self._claim(key, deadline - now())
        left_s, waits_until = deadline - now(), now() + patience_s
        while not ours and features is None and now() < waits_until:
            await asyncio.sleep(POLL_S)
            ours, features = await self._claim(key, left_s)
        if ours and features is None:
            self._claimed.add(key)
        elif ours:
            self.give_up(key)
        self._count("miss" if features is None else "shared")
        return features

    async def _claim(self, key: FeatureKey[Features], left_s: float) -> tuple[bool, Features | None]:
        """Whether it is ours to encode, and the features if they are there by now. Raises RedisFault.

        In this order: who holds a claim writes the record before giving it back. What a patient caller of this gateway
        has claimed is for another of its callers to encode too: nobody waits here for a patient one.
        """
        claim: Command = ("SET", flight_key(key), self._me, "NX", "PX", round(self.limits.flight_s * 1e3))
        claimed, record = await self._ask(left_s, claim, ("GET", record_key(key)))
        if isinstance(claimed, RedisFault):  # full, or a replica: it can still be read, and we encode unclaimed
            self._metrics.redis_errors.labels(claimed.kind).inc()
        return claimed is not None or key in self._claimed, await self._believe(record, key, left_s)

    async def _believe(self, record: Reply, key: FeatureKey[Features], left_s: float) -> Features | None:
        """Deletes what does not fit. Raises RedisFault."""
        if granted(record) is None:
            return None
        try:
            return unpack(record, key, self._card)
        except RecordError as error:
            self._metrics.redis_bad_records.labels(error.reason).inc()
            log.warning("redis_bad_record", reason=error.reason, key=record_key(key))
            await self._ask(left_s, ("UNLINK", record_key(key)))
            return None

    async def _ask(self, left_s: float, *commands: Command) -> list[Reply]:
        """Raises RedisFault."""
        try:
            async with asyncio.timeout(left_s):
                replies = await self._lookups.ask(*commands)
        except TimeoutError as exc:
            raise RedisFault("timeout", f"no answer within {self.limits.timeout_s * 1e3:g} ms") from exc
        self.breaker.succeeded()
        return replies

    def put(self, key: FeatureKey[Features], features: Features) -> None:
        """Keeps the features for every gateway, later: nobody waits for it."""
        self._claimed.discard(key)
        if self.breaker.is_open:
            self._metrics.feature_cache_writes.labels("skipped").inc()
        elif self.unwritten >= MOST_UNWRITTEN:
            self._metrics.feature_cache_writes.labels("dropped").inc()
            self.give_up(key)
        else:
            self._behind.put_nowait((key, features))

    def give_up(self, key: FeatureKey[Any]) -> None:
        """Lets another gateway encode that image, where we said that we would."""
        self._claimed.discard(key)
        if not self.breaker.is_open and not self._behind.full():
            self._behind.put_nowait((key, None))

    @property
    def unwritten(self) -> int:
        """Records and claims that wait for their turn."""
        return self._behind.qsize()

    async def _write_behind(self) -> None:
        while True:
            key, features = await self._behind.get()
            if self.breaker.is_open:
                if features is not None:
                    self._metrics.feature_cache_writes.labels("skipped").inc()
                continue
            release: Command = ("EVAL", RELEASE, 1, flight_key(key), self._me)
            try:
                if features is None:
                    granted(*await self._writes.ask(release))
                else:
                    await self._write(key, features, release)
            except RedisFault as fault:
                self._failed(fault)

    async def _write(self, key: FeatureKey[Features], features: Features, release: Command) -> None:
        """Raises RedisFault where the connection fails."""
        result = "failed"
        try:
            if features.nbytes > INLINE_PACK_BYTES:
                record = await asyncio.to_thread(pack, key, features)
            else:
                record = pack(key, features)
            kept, _ = await self._writes.ask(
                ("SET", record_key(key), record, "PX", round(self.limits.ttl_s * 1e3)), release
            )
            if isinstance(kept, RedisFault):
                self._metrics.redis_errors.labels(kept.kind).inc()
            else:
                result = "kept"
        finally:
            self._metrics.feature_cache_writes.labels(result).inc()

    async def _try_again(self) -> None:
        """While the breaker is open, does what lookups do, on their connection: no request pays for the trial."""
        while True:
            await self._opened.wait()
            await asyncio.sleep(self.breaker.pause_s)
            try:
                granted(*await self._lookups.ask(("GET", TRIAL_KEY)))
            except RedisFault as fault:
                self._failed(fault)
            else:
                self.breaker.close(asyncio.get_running_loop().time())
                self._opened.clear()
                self._metrics.redis_breaker_open.set(0)
                self._reason = ""
                log.info("redis_in_use")

    def _failed(self, fault: RedisFault) -> None:
        self._metrics.redis_errors.labels(fault.kind).inc()
        self.breaker.failed(asyncio.get_running_loop().time())
        if self.breaker.is_open:
            self._opened.set()
            self._metrics.redis_breaker_open.set(1)
            if self._reason != fault.kind:
                self._reason = fault.kind
                log.warning("redis_not_in_use", kind=fault.kind, reason=fault.message)

    async def _gauge(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_INTERVAL_S)
            if not self.breaker.is_open:
                await self.measure()

    async def measure(self) -> None:
        """What Redis says of itself: of the whole server, and the same to every gateway."""
        try:
            memory, stats = map(granted, await self._writes.ask(("INFO", "memory"), ("INFO", "stats")))
        except RedisFault:  # an ACL may forbid it, and lookups tell of the rest
            return
        self._metrics.feature_cache_bytes.labels("redis").set(memory["used_memory"])
        evicted, before = stats["evicted_keys"], self._evicted
        if before is not None:
            self._metrics.feature_cache_evictions.labels("redis").inc(max(0, evicted - before))
        self._evicted = evicted

    def _count(self, result: str) -> None:
        self._metrics.feature_cache_lookups.labels("redis", result).inc()
