"""Count what was used in the last minute, by the `limits` library's sliding window, and how many requests are open.

Both are counted in Redis for all gateways. While Redis is not in use, this gateway counts alone and allows its share:
the limit divided by the number of gateways that it last knew of. It begins with what it has charged itself before.

    glimpse:quota:{quota/...}     the library's counters
    glimpse:quota:held:{bucket}   hash: a gateway to its open requests, and when they stop counting
    glimpse:quota:gateways        sorted set: a gateway, and when it was last there

Each gateway tells Redis how many requests it has open, never that there is one more or one less. So whatever was lost
on the way is right again at the next heartbeat. What a gateway told counts for LEASE_S, if it does not tell it again.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from service.cache.redis_client import Command, Lane, RedisFault, Reply, close_counters, counters, granted
from service.cache.redis_tier import RedisTier
from service.system.watch import Watch
from service.telemetry.metrics import Metrics

T = TypeVar("T")
Later = Callable[[], Awaitable[None]]  # work for the background
WINDOW_S = 60
LANE_TIMEOUT_S = 1.0
HEARTBEAT_S = 1.0
FORGOTTEN_S = 10.0  # without a heartbeat, a gateway no longer counts
GATEWAYS = "glimpse:quota:gateways"
LEASE_S = 15  # without a heartbeat, a gateway's open requests no longer count
# Leases end by Redis's own clock. ARGV: this gateway, its open requests with this one, seconds of a lease, most places.
TAKE = """
local now = tonumber(redis.call('TIME')[1])
local open = tonumber(ARGV[2])
local told = redis.call('HGETALL', KEYS[1])
for at = 1, #told, 2 do
    local count, ends = string.match(told[at + 1], '(%d+) (%d+)')
    if tonumber(ends) <= now then
        redis.call('HDEL', KEYS[1], told[at])
    elseif told[at] ~= ARGV[1] then
        open = open + tonumber(count)
    end
end
if open > tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. now + ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
# ARGV: this gateway, its open requests, seconds of a lease.
HOLD = """
if ARGV[2] == '0' then return redis.call('HDEL', KEYS[1], ARGV[1]) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. redis.call('TIME')[1] + ARGV[3])
return redis.call('EXPIRE', KEYS[1], ARGV[3])
"""
# KEYS: two windows of the library's counter. ARGV: the most to take off; in how many ms the window ends in which it was
# charged; by how many ms a window may end before or after that. After a flush of Redis, another window may match.
GIVE_BACK = """
for _, key in ipairs(KEYS) do
    local count = tonumber(redis.call('GET', key) or 0)
    if count > 0 and math.abs(redis.call('PTTL', key) - tonumber(ARGV[2])) < tonumber(ARGV[3]) then
        redis.call('INCRBY', key, -math.min(count, tonumber(ARGV[1])))
    end
end
"""
BEAT = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], 60)
return redis.call('ZCARD', KEYS[1])
"""


@dataclass(frozen=True, slots=True)
class Left:
    """Say what is left of a limit."""

    limit: int
    remaining: int
    reset_s: float  # until all of it is there again
    wait_s: float  # until the cost that was asked about fits; infinite if it never does


@dataclass(frozen=True, slots=True)
class Hit:
    """The result of charging a cost. `back` charges less afterwards."""

    fits: bool
    left: Left
    back: Callable[[int], Awaitable[None]]


class Tally:
    """Count by key in two windows, which begin with the clock's minutes. The earlier one counts by the part of it that
    the last minute still overlaps, as in the library's counters in Redis. A clock that goes back stands still.

    The library's counters in memory are not used: each of their counts takes time for the keys of all tenants.
    """

    def __init__(self) -> None:
        self._number = 0  # of the current window
        self._latest = 0.0  # time that was told
        self._before: Counter[tuple[str, str]] = Counter()
        self._current: Counter[tuple[str, str]] = Counter()

    def counts(self, key: tuple[str, str], now: float) -> tuple[int, float, int, float]:
        """Return the two windows' counts and seconds until they count for nothing, as `left_of` takes them."""
        rest_s = WINDOW_S - self._turn(now) % WINDOW_S
        return self._before[key], rest_s, self._current[key], rest_s + WINDOW_S

    def add(self, key: tuple[str, str], amount: int, now: float) -> Callable[[int], None]:
        """Count an amount. The result gives a part of it back, whatever the time is then."""
        self._turn(now)
        window = self._current
        window[key] += amount

        def give_back(part: int) -> None:
            window[key] -= part

        return give_back

    def _turn(self, now: float) -> float:
        """Begin the window of this time, if it is a new one -> the time to count with."""
        self._latest = max(self._latest, now)
        number = int(self._latest // WINDOW_S)
        if number != self._number:
            self._before = self._current if number == self._number + 1 else Counter()
            self._current, self._number = Counter(), number
        return self._latest


class Windows:
    """Count in this process. With more gateways than one it allows a share."""

    def __init__(self, gateways: int = 1, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.gateways = gateways
        self._clock = clock
        self._tally = Tally()
        self._open: Counter[str] = Counter()

    async def run(self) -> None:
        """Nothing has to run."""

    async def hit(self, bucket: str, unit: str, limit: int, cost: int) -> Hit:
        """Charge a cost if it fits."""
        now, key, limit = self._clock(), (bucket, unit), self.share(limit)
        counts = self._tally.counts(key, now)
        fits = used(*counts) + cost <= limit
        give_back = self._tally.add(key, cost if fits else 0, now)

        async def back(amount: int) -> None:
            give_back(amount)

        return Hit(fits, left_of(limit, cost, *self._tally.counts(key, now)), back)

    def share(self, limit: int) -> int:
        return math.ceil(limit / self.gateways)

    async def take(self, bucket: str, most: int) -> bool:
        """Take one of the places for open requests."""
        if self._open[bucket] >= self.share(most):
            return False
        self._open[bucket] += 1
        return True

    def leave(self, bucket: str) -> Later | None:
        """Give a place back. Returns what is left to do for that in the background."""
        self._open[bucket] -= 1
        if self._open[bucket] <= 0:
            del self._open[bucket]
        return None


class SharedWindows(Windows):
    """Count in Redis for all gateways, and here while Redis is not in use."""

    def __init__(
        self,
        url: str,
        tier: RedisTier,
        metrics: Metrics,
        *,
        timeout_s: float,
        gateways: int | None,
        lease_s: int = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gateways`: their number, if the operator says it."""
        super().__init__(gateways or 1, clock=clock)
        self._tier = tier
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._told_gateways = gateways
        self._me = secrets.token_hex(8)
        self._storage: RedisStorage = counters(url)
        self._lane = Lane(url, LANE_TIMEOUT_S)
        self._is_used = False  # from the first limit on
        self._tellings = 0  # how often Redis was told of open requests, besides by a take
        self._told: dict[str, float] = {}  # buckets with open requests of ours in Redis, and when those stop counting
        metrics.quota_gateways.set(self.gateways)

    async def run(self) -> None:
        """Own the connection, and tell the others that this gateway is there, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lane.run())
            watch = Watch("quotas of all gateways")
            try:
                while True:
                    if self._is_used:
                        with watch.surviving():
                            await self.beat()
                    await asyncio.sleep(HEARTBEAT_S)
            finally:
                await close_counters(self._storage)

    async def beat(self) -> None:
        """Tell that this gateway is there, and its open requests. Learn how many gateways there are."""
        now = self._clock()
        self._told = {bucket: ends for bucket, ends in self._told.items() if ends > now}
        buckets = self._open.keys() | self._told.keys()
        found = await self._tell_open(buckets, command(BEAT, GATEWAYS, self._me, FORGOTTEN_S))
        if found is not None and self._told_gateways is None:
            self.gateways = max(int(found[0]), 1)
            self._metrics.quota_gateways.set(self.gateways)

    async def _tell_open(self, buckets: Collection[str], *others: Command) -> list[Reply] | None:
        """Tell Redis the open requests of these buckets, after other commands -> the replies; None without Redis."""
        self._tellings += 1
        before = {bucket: self._told.pop(bucket) for bucket in buckets if bucket in self._told}
        for bucket in buckets:
            if self._open[bucket]:
                self._told[bucket] = self._clock() + self._lease_s
        held = (command(HOLD, open_key(bucket), self._me, self._open[bucket], self._lease_s) for bucket in buckets)
        replies = None
        try:
            replies = await self._answered(self._replies(*others, *held))
        finally:
            if replies is None:  # it may still say what it said before
                self._told = before | self._told
        return replies

    async def hit(self, bucket: str, unit: str, limit: int, cost: int) -> Hit:
        self._is_used = True
        found = await self._answered(self._counted(partial(hit, self._storage, (bucket, unit), limit, cost)))
        if found is None:
            return await super().hit(bucket, unit, limit, cost)
        # Counted here too, for the share if Redis goes.
        give_back = self._tally.add((bucket, unit), cost if found.fits else 0, self._clock())

        async def back(amount: int) -> None:
            give_back(amount)
            await self._answered(self._counted(partial(found.back, amount)))

        return Hit(found.fits, found.left, back)

    async def take(self, bucket: str, most: int) -> bool:
        self._is_used = True
        self._open[bucket] += 1  # from now on, so that no heartbeat says less
        if self._tier.in_use:
            self._told[bucket] = self._clock() + self._lease_s
        taken, tellings = False, self._tellings
        try:
            asked = command(TAKE, open_key(bucket), self._me, self._open[bucket], self._lease_s, most)
            replies = await self._answered(self._replies(asked))
            taken = self._open[bucket] <= self.share(most) if replies is None else bool(replies[0])
        finally:
            if not taken:
                super().leave(bucket)
        if not taken and self._tellings != tellings:  # Redis was told of it meanwhile
            await self._tell_open([bucket])
        return taken

    def leave(self, bucket: str) -> Later:
        super().leave(bucket)

        async def tell() -> None:
            await self._tell_open([bucket])

        return tell

    async def _replies(self, *commands: Command) -> list[Reply]:
        """Send commands together. Raises RedisFault, also if one is refused."""
        return [granted(reply) for reply in await self._tier.ask(self._lane, self._timeout_s, *commands)]

    async def _counted(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the library's counters. Raises RedisFault."""
        async with self._tier.asking(self._storage, self._timeout_s):
            return await ask()

    async def _answered(self, answer: Awaitable[T]) -> T | None:
        """Return what Redis answers; None, and counting goes on here, if it does not."""
        try:
            found = await answer
        except RedisFault:
            self._metrics.quota_is_local.set(1)
            return None
        self._metrics.quota_is_local.set(0)
        return found


def command(script: str, key: str, *arguments: str | float) -> Command:
    return ("EVAL", script, 1, key, *map(str, arguments))


def open_key(bucket: str) -> str:
    return f"glimpse:quota:held:{{{bucket}}}"


async def hit(storage: RedisStorage, names: tuple[str, str], limit: int, cost: int) -> Hit:
    item = RateLimitItemPerMinute(limit, namespace="quota")
    fits = await SlidingWindowCounterRateLimiter(storage).hit(item, *names, cost=cost)
    # The minute of the library: two whole windows, of which the earlier one counts by the part that still overlaps.
    key = item.key_for(*names)
    counts = await storage.get_sliding_window(key, WINDOW_S)
    ends_at = time.monotonic() + counts[3]

    async def back(amount: int) -> None:
        await give_back(storage, key, amount, ends_at - time.monotonic())

    return Hit(fits, left_of(limit, cost, *counts), back)


async def give_back(storage: RedisStorage, key: str, amount: int, left_s: float) -> None:
    """Take an amount off the window in which it was charged, which counts for `left_s` more. So what a request charged
    before the window's end and did not use is no credit in the next one. No count falls below 0.
    """
    if left_s <= 0:
        return
    current = storage.bridge.prefixed_key(f"{{{key}}}")
    near_ms = WINDOW_S * 1000 // 2  # the two windows end a whole one apart
    await (
        cast(Any, storage.bridge)
        .get_connection()
        .eval(GIVE_BACK, 2, current, f"{current}/-1", amount, int(left_s * 1000), near_ms)
    )


def used(before: int, before_ends_s: float, current: int, _: float) -> int:
    return math.floor(before * before_ends_s / WINDOW_S) + current


def left_of(limit: int, cost: int, before: int, before_ends_s: float, current: int, current_ends_s: float) -> Left:
    """Say what is left. `before` and `current` are the counts of two windows.

    The earlier one counts for nothing after `before_ends_s`, the current one after `current_ends_s`.
    """
    used = before * before_ends_s / WINDOW_S + current
    reset_s = current_ends_s if current > 0 else before_ends_s if before > 0 else 0.0
    return Left(
        limit,
        remaining=max(0, limit - math.floor(used)),
        reset_s=reset_s,
        wait_s=wait_s(limit - cost, before, before_ends_s, current, current_ends_s),
    )


def wait_s(room: int, before: int, before_ends_s: float, current: int, current_ends_s: float) -> float:
    """Return the seconds until no more than `room` is used, if nothing more is."""
    if room < 0:
        return math.inf
    if current <= room:
        over = before * before_ends_s / WINDOW_S + current - room
        return max(0.0, over * WINDOW_S / before) if before > 0 else 0.0
    # Not before the current window has become the earlier one, and has left by so much.
    return max(0.0, current_ends_s - WINDOW_S * room / current)
