"""Vision features in process memory: an LRU cache bounded in bytes. Each view of an image is an entry of its own.

Concurrent requests for one new image share one encode (single flight). The first request leads and the others wait for
its features. If the leader fails, or leaves before its encode was sent, one of the others takes the lead. An encode
that was sent goes on when its leader leaves: the others wait for it, and its features are kept.

Gateways can share a second tier. Only leaders ask it, so an image is looked up there once, however many requests
need it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol

from service.cache.keys import AS_INT8, FeatureKey, Features
from service.cache.lru import Lru
from service.core.vision import Int8Rows, dense
from service.telemetry.metrics import Metrics

Waiting = Callable[[], AbstractContextManager[None]]  # entered while the caller waits for another request's work


class SharedTier(Protocol):
    """Share features with other gateways. Never raises; a lookup ends within the tier's own time limit."""

    async def find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """Find features, or wait up to `patience_s` for another gateway's encode.

        None: the caller encodes, then calls `put` or `give_up`. If it is cancelled there is nothing to give up.
        """
        ...

    def put(self, key: FeatureKey[Features], features: Features) -> None:
        """Keep the features. Does not wait."""
        ...

    def give_up(self, key: FeatureKey[Any]) -> None:
        """Report that the encode that `find` asked for failed or was cancelled. Does not wait."""
        ...


@dataclass(slots=True)
class Found(Generic[Features]):
    """Result of a lookup. Without features, the caller leads: it encodes, and calls `expect`."""

    features: Features | None
    coming: asyncio.Task[Features] | None = None

    def expect(self, coming: asyncio.Task[Features]) -> None:
        """Keep what this task will return. The flight lasts until then, even if the caller leaves before."""
        self.coming = coming


@dataclass(slots=True)
class Flight:
    """One lookup and encode in progress. `brought` stays None if its leader fails."""

    landed: asyncio.Event = field(default_factory=asyncio.Event)
    brought: Any = None  # VisionFeatures or CloserFeatures


class FeatureCache:
    def __init__(
        self, max_bytes: int, metrics: Metrics, shared: SharedTier | None = None, *, as_int8: bool = False
    ) -> None:
        """`as_int8` keeps the rows of features as int8, under keys of their own."""
        self.as_int8 = as_int8
        self._metrics = metrics
        self._shared = shared
        self._kept: Lru[FeatureKey[Any], Any] = Lru(
            max_bytes, metrics.feature_cache_bytes.labels("memory"), metrics.feature_cache_evictions.labels("memory")
        )
        self._flights: dict[tuple[FeatureKey[Any], bool], Flight] = {}  # the bool: whether the leader is patient

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def holds(self, key: FeatureKey[Any]) -> bool:
        """Return whether this process's memory has the features. It counts no lookup."""
        if self.as_int8:
            key = replace(key, fingerprint=key.fingerprint + AS_INT8)
        return key in self._kept

    @asynccontextmanager
    async def find(
        self,
        key: FeatureKey[Features],
        left_s: float = math.inf,
        *,
        patient: bool = False,
        waiting: Waiting = nullcontext,
    ) -> AsyncIterator[Found[Features]]:
        """Find features, or wait for a flight in progress; otherwise the caller leads a flight in the block.

        A `patient` leader may be delayed, so only patient callers wait for its flight. At most half of `left_s`, the
        time that the request has left, is spent waiting for another gateway. Every wait is inside `waiting()`.
        """
        if self.as_int8:
            key = replace(key, fingerprint=key.fingerprint + AS_INT8)
        if (known := await self._known(key, left_s, patient, waiting)) is not None:
            yield Found(known)
            return
        found: Found[Features] = Found(None)
        try:
            yield found
        finally:
            if found.coming is not None:
                self._expect(key, patient, found.coming)
            else:
                self._encoded(key, patient, None)

    def _expect(self, key: FeatureKey[Features], patient: bool, coming: asyncio.Task[Features]) -> None:
        """End the leader's encode when the task ends, which may be now."""

        def came(task: asyncio.Task[Features]) -> None:
            failed = task.cancelled() or task.exception() is not None
            self._encoded(key, patient, None if failed else task.result())

        self._metrics.feature_cache_encodes.inc()
        if coming.done():
            came(coming)
        else:
            coming.add_done_callback(came)

    async def _known(
        self, key: FeatureKey[Features], left_s: float, patient: bool, waiting: Waiting
    ) -> Features | None:
        """None: the caller leads the flight, which has begun."""
        now = asyncio.get_running_loop().time
        deadline = now() + left_s
        if (known := await self._kept_or_joined(key, patient, waiting)) is not None:
            return known
        self._flights[key, patient] = Flight()
        if self._shared is None:
            return None
        try:
            with waiting():
                known = await self._shared.find(key, max(deadline - now(), 0.0) / 2)
        except BaseException:  # cancelled: another caller takes the lead
            self._land(key, patient, None)
            raise
        if known is not None:
            self._land(key, patient, known)
        return known

    async def _kept_or_joined(self, key: FeatureKey[Features], patient: bool, waiting: Waiting) -> Features | None:
        kept: Features
        brought: Features | None
        while True:
            if (known := self._kept.get(key)) is not None:
                self._count("hit")
                kept = known
                return kept
            flight = self._flights.get((key, False)) or (self._flights.get((key, True)) if patient else None)
            if flight is None:
                self._count("miss")
                return None
            with waiting():
                await flight.landed.wait()
            brought = flight.brought
            if brought is not None:
                self._count("shared")
                return brought

    def _encoded(self, key: FeatureKey[Features], patient: bool, brought: Features | None) -> None:
        """End the leader's encode. `brought` is None if it failed."""
        if self.as_int8 and brought is not None:
            brought = replace(brought, features=Int8Rows.of(dense(brought.features)))
        self._land(key, patient, brought)
        if self._shared is None:
            return
        if brought is None:
            self._shared.give_up(key)
        else:
            self._shared.put(key, brought)

    def _land(self, key: FeatureKey[Features], patient: bool, brought: Features | None) -> None:
        landed = [self._flights.pop((key, patient))]
        if brought is not None:
            self._kept.keep(key, brought, brought.nbytes)
            if (other := self._flights.get((key, not patient))) is not None:
                landed.append(other)  # those who wait for its leader need not
        for flight in landed:
            flight.brought = flight.brought or brought
            flight.landed.set()

    def _count(self, result: Literal["hit", "miss", "shared"]) -> None:
        self._metrics.feature_cache_lookups.labels("memory", result).inc()
