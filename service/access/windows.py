"""Count what was used in the last minute, by the `limits` library's sliding window, and how many requests are open.

Both are counted in Redis for all gateways. While Redis is not in use, this gateway counts alone and allows its share:
the limit divided by the number of gateways that it last knew of. It begins with what it has charged itself before.

    glimpse:quota:{quota/...}     the library's counters
    glimpse:quota:open:{bucket}   sorted set: a request that is open, and when its place ends at the latest
    glimpse:quota:gateways        sorted set: a gateway, and when it was last there
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from service.cache.redis_client import Lane, RedisFault, close_counters, counters, fault_of, granted
from service.telemetry.metrics import Metrics

T = TypeVar("T")
Later = Callable[[], Awaitable[None]]  # work for the background
WINDOW_S = 60
LANE_TIMEOUT_S = 1.0
HEARTBEAT_S = 1.0
BROKEN = ("timeout", "unreachable", "fault")  # kinds of faults that are the connection's
FORGOTTEN_S = 10.0  # without a heartbeat, a gateway no longer counts
GATEWAYS = "glimpse:quota:gateways"
# Places are taken by Redis's own clock. ARGV: most places, seconds until the place ends, its name.
TAKE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[3])
redis.call('EXPIRE', KEYS[1], tonumber(ARGV[2]) + 60)
return 1
"""
LEAVE = "return redis.call('ZREM', KEYS[1], ARGV[1])"
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


class Tier(Protocol):
    """Know whether Redis is in use."""

    @property
    def in_use(self) -> bool: ...

    def failed(self, fault: RedisFault) -> None:
        """Count a fault of the connection."""
        ...

    def refused(self, fault: RedisFault) -> None:
        """Count a command that Redis refused."""
        ...


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

    async def take(self, bucket: str, place: str, most: int) -> bool:  # noqa: ARG002
        """Take one of the places for open requests."""
        if self._open[bucket] >= self.share(most):
            return False
        self._open[bucket] += 1
        return True

    def leave(self, bucket: str, place: str) -> Later | None:  # noqa: ARG002
        """Give the place back. Returns what is left to do for that in the background."""
        self._open[bucket] -= 1
        if self._open[bucket] <= 0:
            del self._open[bucket]
        return None


class SharedWindows(Windows):
    """Count in Redis for all gateways, and here while Redis is not in use."""

    def __init__(
        self,
        url: str,
        tier: Tier,
        metrics: Metrics,
        *,
        timeout_s: float,
        open_s: float,
        gateways: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_s`: how long a request can be open. `gateways`: their number, if the operator says it."""
        super().__init__(gateways or 1, clock=clock)
        self._tier = tier
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._open_s = math.ceil(open_s)
        self._told_gateways = gateways
        self._me = secrets.token_hex(8)
        self._storage: RedisStorage = counters(url)
        self._lane = Lane(url, LANE_TIMEOUT_S)
        self._is_used = False  # from the first limit on
        self._here: set[str] = set()  # places that only this gateway knows of
        metrics.quota_gateways.set(self.gateways)

    async def run(self) -> None:
        """Own the connection, and tell the others that this gateway is there, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lane.run())
            try:
                while True:
                    if self._is_used:
                        await self.beat()
                    await asyncio.sleep(HEARTBEAT_S)
            finally:
                await close_counters(self._storage)

    async def beat(self) -> None:
        found = await self._ask(self._eval(BEAT, GATEWAYS, self._me, FORGOTTEN_S))
        if isinstance(found, int) and self._told_gateways is None:
            self.gateways = max(found, 1)
            self._metrics.quota_gateways.set(self.gateways)

    async def hit(self, bucket: str, unit: str, limit: int, cost: int) -> Hit:
        self._is_used = True
        found = await self._ask(hit(self._storage, (bucket, unit), limit, cost))
        if found is None:
            return await super().hit(bucket, unit, limit, cost)
        # Counted here too, for the share if Redis goes.
        give_back = self._tally.add((bucket, unit), cost if found.fits else 0, self._clock())

        async def back(amount: int) -> None:
            give_back(amount)
            await self._ask(found.back(amount))

        return Hit(found.fits, found.left, back)

    async def take(self, bucket: str, place: str, most: int) -> bool:
        self._is_used = True
        taken = await self._ask(self._eval(TAKE, open_key(bucket), most, self._open_s, place))
        if taken is None:
            self._here.add(place)
            if await super().take(bucket, place, most):
                return True
            self._here.discard(place)
            return False
        if taken:  # counted here too, for the share if Redis goes
            self._open[bucket] += 1
        return bool(taken)

    def leave(self, bucket: str, place: str) -> Later | None:
        super().leave(bucket, place)
        if place in self._here:
            self._here.discard(place)
            return None

        async def tell() -> None:
            await self._ask(self._eval(LEAVE, open_key(bucket), place))

        return tell

    async def _eval(self, script: str, key: str, *arguments: str | int | float) -> int:
        (reply,) = await self._lane.ask(("EVAL", script, 1, key, *map(str, arguments)))
        return int(granted(reply))

    async def _ask(self, asked: Awaitable[T]) -> T | None:
        """Return what Redis answers; None, and counting goes on here, if it does not within its time."""
        if not self._tier.in_use:
            close(asked)
            self._metrics.quota_is_local.set(1)
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asked
        except RedisFault as fault:
            self._tell(fault)
        except TimeoutError:
            self._tell(RedisFault("timeout", f"no answer within {self._timeout_s * 1e3:g} ms"))
        except Exception as exc:  # the library passes on every fault of Redis's client: see fault_of
            self._tell(fault_of(exc))
        else:
            self._metrics.quota_is_local.set(0)
            return found
        self._metrics.quota_is_local.set(1)
        return None

    def _tell(self, fault: RedisFault) -> None:
        (self._tier.failed if fault.kind in BROKEN else self._tier.refused)(fault)


def close(asked: Awaitable[object]) -> None:
    """End a coroutine that is not awaited."""
    if asyncio.iscoroutine(asked):
        asked.close()


def open_key(bucket: str) -> str:
    return f"glimpse:quota:open:{{{bucket}}}"


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
