"""Charge what requests use to their tenants' quotas: a minute's requests, images and tokens, and open requests.

A request is charged when it arrives. Before its work begins, it is charged the most images and tokens that it can use;
when it ends, what it did not use is given back. So a tenant never gets more than its quota, and an answer that was cut
short costs what was made of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from functools import partial

from service.access.keys import Keyring, Limits
from service.access.windows import Hit, Later, Left, Windows
from service.core.access import IN_HEADERS, UNLIMITED, Account, Use
from service.core.errors import QuotaExceeded
from service.system.watch import Watch
from service.telemetry.metrics import Metrics

MOST_BEHIND = 10_000  # settlements that wait; further ones are lost, which the tenant pays for until the minute is over
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0
WORDS = {unit: unit.replace("_", " ") for unit in IN_HEADERS}
MENDS = {
    "images": "send fewer images, or lower video_frames",
    "visual_tokens": "lower budget.visual_tokens or video_frames, or send fewer images",
    "generated_tokens": "lower max_tokens",
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is limited together: a tenant, or one key."""

    name: str
    whose: str  # in messages
    limits: Limits

    def most(self, unit: str) -> int | None:
        most: int | None = getattr(self.limits, f"{unit}_per_minute")
        return most


class Quotas:
    """Hold the accounts of all tenants. Made once by the composition root."""

    def __init__(self, defaults: Limits, ring: Callable[[], Keyring], windows: Windows, metrics: Metrics) -> None:
        """`ring` gives the keys in use, which have limits of their own."""
        self.windows = windows
        self.metrics = metrics
        self._defaults = defaults
        self._ring = ring
        self._behind: asyncio.Queue[Later] = asyncio.Queue(MOST_BEHIND)
        self.unasked: set[asyncio.Future[Hit]] = set()  # charges under way whose callers have left

    def of(self, tenant: str, key: str) -> Account:
        """Open the account of one request."""
        of_tenant, of_key = self._ring().limits(tenant, key, self._defaults)
        buckets = [Bucket(f"tenant/{tenant}", "your tenant", of_tenant)] if of_tenant else []
        if of_key:
            buckets.append(Bucket(f"key/{key}", "your API key", of_key))
        return LimitedAccount(self, buckets) if buckets else UNLIMITED

    def later(self, work: Later) -> None:
        """Do it in the background."""
        try:
            self._behind.put_nowait(work)
        except asyncio.QueueFull:
            self.metrics.quota_settlements_lost.inc()

    def refund(self, cost: int, hit: asyncio.Future[Hit]) -> None:
        """Give a charge back whose caller left before it was made."""
        self.unasked.discard(hit)
        if not hit.cancelled() and hit.exception() is None and hit.result().fits:
            self.later(partial(hit.result().back, cost))

    async def settle(self) -> None:
        """Do what waits."""
        while not self._behind.empty():
            await self._behind.get_nowait()()

    async def run(self) -> None:
        """Settle in the background until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.windows.run())
            watch = Watch("quotas")
            while True:
                work = await self._behind.get()
                with watch.surviving():
                    await work()


class LimitedAccount:
    """Charge one request to the buckets that limit it."""

    def __init__(self, quotas: Quotas, buckets: Sequence[Bucket]) -> None:
        self._quotas = quotas
        self._buckets = buckets
        self._places: list[str] = []  # the buckets in which it has one
        self._left: dict[str, Left] = {}  # by unit, the least that a bucket has left

    async def enter(self, *, place: bool = True) -> None:
        """Take a place in every bucket, then charge one request to each. Raises QuotaExceeded."""
        if place:
            await self._take_places()
        await self._charge("requests", 1)

    async def _take_places(self) -> None:
        for bucket in self._buckets:
            if (most := bucket.limits.concurrent_requests) is None:
                continue
            if not await self._quotas.windows.take(bucket.name, most):
                raise self._refusal("concurrent_requests", LEAST_RETRY_S, f"{bucket.whose} has {most:,} open requests")
            self._places.append(bucket.name)

    @asynccontextmanager
    async def charged(self, most: Use) -> AsyncIterator[Use]:
        """Charge the most, and give back what the block did not use. Raises QuotaExceeded."""
        hits: dict[str, list[Hit]] = {}
        use = Use()
        try:
            for each in fields(Use):
                if cost := getattr(most, each.name):
                    hits[each.name] = await self._charge(each.name, cost)
            yield use
        finally:
            for unit, made in hits.items():
                self._give_back(made, getattr(most, unit) - getattr(use, unit))

    def leave(self) -> None:
        for bucket in self._places:
            if (rest := self._quotas.windows.leave(bucket)) is not None:
                self._quotas.later(rest)
        self._places.clear()

    def headers(self) -> list[tuple[str, str]]:
        told: list[tuple[str, str]] = []
        for unit, left in self._left.items():
            name = IN_HEADERS[unit]
            told += [
                (f"x-ratelimit-limit-{name}", f"{left.limit}"),
                (f"x-ratelimit-remaining-{name}", f"{left.remaining}"),
                (f"x-ratelimit-reset-{name}", in_words(left.reset_s)),
            ]
        return told

    async def _charge(self, unit: str, cost: int) -> list[Hit]:
        """Charge a cost to every bucket that limits the unit, or to none. Raises QuotaExceeded."""
        made: list[Hit] = []
        try:
            for bucket in self._buckets:
                if (most := bucket.most(unit)) is not None:
                    made.append(await self._charge_bucket(bucket, unit, most, cost))
        except BaseException:  # refused, or the caller left
            self._give_back(made, cost)
            raise
        return made

    async def _charge_bucket(self, bucket: Bucket, unit: str, most: int, cost: int) -> Hit:
        """Raises QuotaExceeded.

        Redis may charge although the caller has left, so the charge is waited for, and given back.
        """
        hit = asyncio.ensure_future(self._quotas.windows.hit(bucket.name, unit, most, cost))
        try:
            found = await asyncio.shield(hit)
        except asyncio.CancelledError:
            self._quotas.unasked.add(hit)
            hit.add_done_callback(partial(self._quotas.refund, cost))
            raise
        if unit not in self._left or found.left.remaining < self._left[unit].remaining:
            self._left[unit] = found.left
        if not found.fits:
            raise self._over(bucket, unit, cost, found.left)
        return found

    def _give_back(self, made: Sequence[Hit], amount: int) -> None:
        if amount > 0:
            for each in made:
                self._quotas.later(partial(each.back, amount))

    def _over(self, bucket: Bucket, unit: str, cost: int, left: Left) -> QuotaExceeded:
        used = f"{bucket.whose} may use {left.limit:,} {WORDS[unit]} a minute here, and has {left.remaining:,} left"
        needs = f"; this request may need {cost:,}: {MENDS[unit]}, or try again later" if unit in MENDS else ""
        return self._refusal(unit, left.wait_s, used + needs)

    def _refusal(self, unit: str, wait_s: float, why: str) -> QuotaExceeded:
        self._quotas.metrics.quota_refusals.labels(unit).inc()
        retry_s = min(max(wait_s, LEAST_RETRY_S), MOST_RETRY_S)
        message = f"the quota is used up: {why}; try again in {math.ceil(retry_s)} s"
        return QuotaExceeded(message, retry_after_s=retry_s)


def in_words(seconds: float) -> str:
    """Write a time as OpenAI's headers do: 120ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1e3))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
