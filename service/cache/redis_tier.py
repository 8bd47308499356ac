"""Share vision features between gateways through Redis, so that each image is encoded once for all of them.

Whatever Redis does, a request waits at most `timeout_s` for it. After that, and while the breaker is open, the request
goes on as if there were no Redis. The wait for another gateway's encode has its own limit, `flight_s`. Nothing here
raises.

The keys of one image share a Redis Cluster slot, because only the text in braces is hashed:

    glimpse:1:features:{encoder fingerprint:view:blake3 of the image}    the record, kept for `ttl_s`
    glimpse:1:flight:{encoder fingerprint:view:blake3 of the image}      the encoding gateway's claim, for `flight_s`
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog

from service.cache.breaker import Breaker
from service.cache.keys import AS_INT8, FeatureKey, Features
from service.cache.records import VERSION, RecordError, pack, unpack
from service.cache.redis_client import Command, Kind, Lane, RedisFault, Reply, fault_of, granted, is_cluster
from service.core.card import ModelCard
from service.system.watch import Watch
from service.telemetry.metrics import Metrics

log = structlog.get_logger()

LANE_TIMEOUT_S = 1.0  # after this a connection counts as lost; requests stop waiting earlier (`timeout_s`)
MOST_UNWRITTEN = 64  # records that wait to be written: 370 MB if all are closer views of the largest encoder
INLINE_PACK_BYTES = 256 * 1024  # a larger record is packed in a thread: 1.5 MB take 1 ms
POLL_S = 0.01  # between two lookups while another gateway encodes
GAUGE_INTERVAL_S = 5.0
COMPLAINT_INTERVAL_S = 60.0  # between two log lines about the same fault
MENDS: Mapping[Kind, str] = {
    "full": "give Redis the policy volatile-lru (maxmemory-policy), or more memory (maxmemory)",
    "denied": "give the user of GLIMPSE_REDIS_URL the commands GET, SET, UNLINK and EVAL on keys glimpse:*, and for "
    "keys, quotas and shared images those that docs/operations.md lists",
    "refused": "name a Redis that takes writes in GLIMPSE_REDIS_URL",
}

PREFIX = f"glimpse:{VERSION}"
TRIAL_KEY = f"{PREFIX}:trial"  # never written
# After a claim has expired, the key may hold another gateway's claim.
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end return 0"


def record_key(key: FeatureKey[Any]) -> str:
    return f"{PREFIX}:features:{{{key.fingerprint}:{key.view}:{key.digest}}}"


def flight_key(key: FeatureKey[Any]) -> str:
    return f"{PREFIX}:flight:{{{key.fingerprint}:{key.view}:{key.digest}}}"


@dataclass(frozen=True, slots=True)
class RedisLimits:
    timeout_s: float  # how long one request waits for Redis
    flight_s: float  # how long a gateway waits for another's encode, and until a claim expires
    ttl_s: float  # until a record expires


class RedisTier:
    """Usable while `run` runs. Before that, and while Redis is down, nothing is found and nothing is kept."""

    def __init__(self, url: str, limits: RedisLimits, card: ModelCard, metrics: Metrics) -> None:
        self.limits = limits
        self.breaker = Breaker()
        self._card = card
        self._cards = {card.fingerprint: card}  # of all variants
        self._is_cluster = is_cluster(url)  # INFO of one node does not cover the others
        self._metrics = metrics
        self._me = secrets.token_hex(8)
        self._encoding: Counter[FeatureKey[Any]] = Counter()  # callers that have not called `put` or `give_up` yet
        self._lookups = Lane(url, LANE_TIMEOUT_S)
        self._writes = Lane(url, LANE_TIMEOUT_S)  # separate, so that a write never delays a lookup
        self._behind: asyncio.Queue[tuple[FeatureKey[Any], Any]] = asyncio.Queue(MOST_UNWRITTEN)
        self._over: asyncio.Queue[FeatureKey[Any]] = asyncio.Queue()  # whose claims are to be released
        self._opened = asyncio.Event()
        self._opened.set()
        self._reason = ""  # why Redis is not in use, as last logged
        self._told_at: dict[tuple[str, str], float] = {}  # when a fault was last logged, by event and kind
        self._evicted: int | None = None  # keys, since Redis started, as last measured
        metrics.redis_breaker_open.set(1)

    def know(self, card: ModelCard) -> None:
        """Accept records of this card's vision encoder too."""
        self._cards[card.fingerprint] = card

    def _card_of(self, key: FeatureKey[Any]) -> ModelCard:
        return self._cards.get(key.fingerprint.removesuffix(AS_INT8), self._card)

    @property
    def in_use(self) -> bool:
        """Whether Redis may be asked now."""
        return not self.breaker.is_open

    async def run(self) -> None:
        """Own the connections and all background work, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lookups.run())
            tasks.create_task(self._writes.run())
            tasks.create_task(self._write_behind())
            tasks.create_task(self._release_behind())
            tasks.create_task(self._try_again())
            if not self._is_cluster:
                tasks.create_task(self._gauge())

    async def find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """Find features, or wait up to `patience_s` for another gateway's encode.

        None: the caller encodes, then calls `put` or `give_up`.
        """
        features = None
        if self.breaker.is_open:
            self._count("skipped")
        else:
            try:
                with self._metrics.redis_lookup.time():
                    features = await self._find(key, min(patience_s, self.limits.flight_s))
            except RedisFault:
                self._count("failed")
            except BaseException:  # cancelled: Redis may have granted the claim
                self._release(key)
                raise
        if features is None:
            self._encoding[key] += 1
        return features

    async def _find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """Find features as `find` does. Raises RedisFault."""
        now = asyncio.get_running_loop().time
        deadline = now() + self.limits.timeout_s
        (record,) = await self.ask(self._lookups, deadline - now(), ("GET", record_key(key)))
        if (features := await self._believe(record, key, deadline - now())) is not None:
            self._count("hit")
            return features
        ours, features = await self._claim(key, deadline - now())
        waits_until = now() + patience_s
        while not ours and features is None and now() < waits_until:
            await asyncio.sleep(POLL_S)
            ours, features = await self._claim(key, self.limits.timeout_s)
        if ours and features is not None:
            self._release(key)
        self._count("miss" if features is None else "shared")
        return features

    async def _claim(self, key: FeatureKey[Features], left_s: float) -> tuple[bool, Features | None]:
        """Try to claim the encode, then read the record. Raises RedisFault.

        Returns whether this gateway may encode, and the features if they are there by now. The order matters: a gateway
        writes the record before it releases its claim. If a patient caller of this gateway encodes, its other callers
        may encode too, because they do not wait for a patient one. If Redis is full or a replica, it can still be read,
        and this gateway encodes without a claim.
        """
        claim: Command = ("SET", flight_key(key), self._me, "NX", "PX", round(self.limits.flight_s * 1e3))
        claimed, record = await self.ask(self._lookups, left_s, claim, ("GET", record_key(key)))
        return claimed is not None or key in self._encoding, await self._believe(record, key, left_s)

    async def _believe(self, record: Reply, key: FeatureKey[Features], left_s: float) -> Features | None:
        """Unpack the record, and delete one that does not fit. Raises RedisFault."""
        if granted(record) is None:
            return None
        try:
            # No Redis sends anything but bytes here. Other programs that speak its protocol may.
            return unpack(record if isinstance(record, bytes) else b"", key, self._card_of(key))
        except RecordError as error:
            self._metrics.redis_bad_records.labels(error.reason).inc()
            log.warning("redis_bad_record", reason=error.reason, key=record_key(key))
            await self.ask(self._lookups, left_s, ("UNLINK", record_key(key)))
            return None

    async def ask(self, lane: Lane, timeout_s: float | None, *commands: Command) -> list[Reply]:
        """Send commands -> their replies, a RedisFault for each one that Redis refused. Raises what `asking` does."""
        async with self.asking(lane, timeout_s):
            replies = await lane.ask(*commands)
            for reply in replies:
                if isinstance(reply, RedisFault) and not reply.is_refusal:
                    raise reply
        for reply in replies:
            if isinstance(reply, RedisFault):
                self._refused(reply)
        return replies

    @asynccontextmanager
    async def asking(self, connection: object, timeout_s: float | None) -> AsyncIterator[None]:
        """Let the block ask Redis, and count how it went.

        Raises RedisFault, whatever the fault is; without any, if Redis is not in use.
        """
        if self.breaker.is_open:
            raise RedisFault("unreachable", "it is not in use")
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as exc:
            raise self._failed(RedisFault("timeout", f"no answer within {timeout_s or 0:.3g} s"), connection) from exc
        except RedisFault as fault:
            self._failed(fault, connection)
            raise
        except Exception as exc:  # the counters' library passes on every fault of Redis's client
            found = fault_of(exc)
            raise (self._refused(found) if found.is_refusal else self._failed(found, connection)) from exc
        self.breaker.succeeded(connection)

    def put(self, key: FeatureKey[Features], features: Features) -> None:
        """Keep the features for every gateway, in the background."""
        self._ended(key)
        if self.breaker.is_open:
            self._metrics.feature_cache_writes.labels("skipped").inc()
        elif self._behind.full():
            self._metrics.feature_cache_writes.labels("dropped").inc()
            self._tell(
                "redis_writes_dropped",
                "slow",
                reason=f"{MOST_UNWRITTEN} records wait to be written",
                mend="give Redis a faster machine or network, or each Redis fewer gateways",
            )
            self._release(key)
        else:
            self._behind.put_nowait((key, features))

    def give_up(self, key: FeatureKey[Any]) -> None:
        """Release our claim, so that another gateway can encode the image."""
        self._ended(key)
        self._release(key)

    def _ended(self, key: FeatureKey[Any]) -> None:
        """Record that a caller does not encode any more."""
        self._encoding[key] -= 1
        if self._encoding[key] <= 0:
            del self._encoding[key]

    def _release(self, key: FeatureKey[Any]) -> None:
        """Release our claim in the background, unless another caller of this gateway encodes under it."""
        if key not in self._encoding:
            self._over.put_nowait(key)

    @property
    def unwritten(self) -> int:
        """Records that wait to be written and claims that wait to be released."""
        return self._behind.qsize() + self._over.qsize()

    async def _release_behind(self) -> None:
        """Release claims on the lookups' connection: a release must not wait for the records that are written."""
        watch = Watch("claims")
        while True:
            key = await self._over.get()
            with watch.surviving(), suppress(RedisFault):  # the claim then expires after `flight_s`
                await self.ask(self._lookups, None, self._release_of(key))

    def _release_of(self, key: FeatureKey[Any]) -> Command:
        return "EVAL", RELEASE, 1, flight_key(key), self._me

    async def _write_behind(self) -> None:
        watch = Watch("features for Redis")
        while True:
            key, features = await self._behind.get()
            if self.breaker.is_open:
                self._metrics.feature_cache_writes.labels("skipped").inc()
                continue
            with watch.surviving(), suppress(RedisFault):
                await self._write(key, features)

    async def _write(self, key: FeatureKey[Features], features: Features) -> None:
        """Write the record and release the claim. Raises RedisFault if the connection fails."""
        result = "failed"
        try:
            if features.nbytes > INLINE_PACK_BYTES:
                record = await asyncio.to_thread(pack, key, features)
            else:
                record = pack(key, features)
            write: Command = ("SET", record_key(key), record, "PX", round(self.limits.ttl_s * 1e3))
            kept, _ = await self.ask(self._writes, None, write, self._release_of(key))
            if not isinstance(kept, RedisFault):
                result = "kept"
        finally:
            self._metrics.feature_cache_writes.labels(result).inc()

    async def _try_again(self) -> None:
        """While the breaker is open, try a lookup on the lookups' connection, so that no request waits for a trial."""
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

    def _refused(self, fault: RedisFault) -> RedisFault:
        """Count a command that Redis refused. The connection is in order, so lookups go on."""
        self._metrics.redis_errors.labels(fault.kind).inc()
        mend = MENDS.get(fault.kind, "see the log of Redis")
        self._tell("redis_refuses_writes", fault.kind, reason=fault.message, mend=mend)
        return fault

    def _tell(self, event: str, kind: str, **fields: str) -> None:
        """Log a fault that can come with every request: at most one line in COMPLAINT_INTERVAL_S."""
        now = asyncio.get_running_loop().time()
        if now - self._told_at.get((event, kind), -math.inf) >= COMPLAINT_INTERVAL_S:
            self._told_at[event, kind] = now
            log.warning(event, kind=kind, **fields)

    def _failed(self, fault: RedisFault, connection: object = None) -> RedisFault:
        """Count a fault of a connection. Several in a row open the breaker."""
        self._metrics.redis_errors.labels(fault.kind).inc()
        self.breaker.failed(asyncio.get_running_loop().time(), connection)
        if self.breaker.is_open:
            self._opened.set()
            self._metrics.redis_breaker_open.set(1)
            if self._reason != fault.kind:
                self._reason = fault.kind
                log.warning("redis_not_in_use", kind=fault.kind, reason=fault.message)
        else:
            self._tell("redis_fault", fault.kind, reason=fault.message)
        return fault

    async def _gauge(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_INTERVAL_S)
            if not self.breaker.is_open:
                await self.measure()

    async def measure(self) -> None:
        """Set the gauges from INFO, which covers the whole server and is the same for every gateway."""
        try:
            memory, stats = map(granted, await self._writes.ask(("INFO", "memory"), ("INFO", "stats")))
        except RedisFault:  # an ACL may forbid INFO; lookups report every other fault
            return
        used, evicted, before = _number(memory, "used_memory"), _number(stats, "evicted_keys"), self._evicted
        if used is not None:
            self._metrics.feature_cache_bytes.labels("redis").set(used)
        if evicted is not None and before is not None:
            self._metrics.feature_cache_evictions.labels("redis").inc(max(0, evicted - before))
        self._evicted = evicted

    def _count(self, result: str) -> None:
        self._metrics.feature_cache_lookups.labels("redis", result).inc()


def _number(told: object, name: str) -> int | None:
    """One field of INFO; None if this server does not tell it, as some that speak Redis's protocol do not."""
    found = told.get(name) if isinstance(told, dict) else None
    return found if isinstance(found, int) else None
