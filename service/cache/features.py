"""What the vision encoder found, kept in process memory: least recently used first to go, bounded in bytes. Each view
of an image is a record of its own.

Requests for one new image share one encode: the first one leads, the others wait for what it brings. A leader that
fails or goes away hands over to one of them, so nobody waits for somebody who has left.

Behind the memory there may be a tier that gateways share. Only leaders ask it, so one image is looked up there once
however many requests there are for it.
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
from service.metrics import Metrics

Waiting = Callable[[], AbstractContextManager[None]]  # a block that lasts as long as a wait for another's work


class SharedTier(Protocol):
    """Features that other gateways can find. Never raises and never takes longer than it is known to."""

    async def find(self, key: FeatureKey[Features], patience_s: float) -> Features | None:
        """What is kept, or what another gateway brings within `patience_s`. None: encode, then `put` or `give_up`."""
        ...

    def put(self, key: FeatureKey[Features], features: Features) -> None:
        """Does not wait."""
        ...

    def give_up(self, key: FeatureKey[Any]) -> None:
        """The encode that `find` left to us failed, or will never be. Does not wait."""
        ...


@dataclass(slots=True)
class Found(Generic[Features]):
    """What a lookup brought. Without features the caller leads: it encodes and then calls `keep`."""

    features: Features | None
    brought: Features | None = None

    def keep(self, features: Features) -> None:
        self.brought = features


@dataclass(slots=True)
class Flight:
    """One lookup and encode under way. `brought` stays empty where its leader failed."""

    landed: asyncio.Event = field(default_factory=asyncio.Event)
    brought: Any = None  # what the key's view gives


class FeatureCache:
    def __init__(
        self, max_bytes: int, metrics: Metrics, shared: SharedTier | None = None, *, as_int8: bool = False
    ) -> None:
        """`as_int8` keeps the features' rows rounded, under keys of their own."""
        self.as_int8 = as_int8
        self._metrics = metrics
        self._shared = shared
        self._kept: Lru[FeatureKey[Any], Any] = Lru(
            max_bytes, metrics.feature_cache_bytes.labels("memory"), metrics.feature_cache_evictions.labels("memory")
        )
        self._flights: dict[tuple[FeatureKey[Any], bool], Flight] = {}  # and whether its leader is patient

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    @asynccontextmanager
    async def find(
        self,
        key: FeatureKey[Features],
        left_s: float = math.inf,
        *,
        patient: bool = False,
        waiting: Waiting = nullcontext,
    ) -> AsyncIterator[Found[Features]]:
        """Features that are kept or that a flight under way brings; else the caller leads the flight in the block.

        Who is `patient` lets others go first, so that only the patient wait for what it brings. Of what is left of the
        request's `left_s`, at most half goes to waiting for another gateway. Every wait is spent inside `waiting()`.
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
            self._encoded(key, patient, found.brought)

    async def _known(
        self, key: FeatureKey[Features], left_s: float, patient: bool, waiting: Waiting
    ) -> Features | None:
        """None: the caller leads the flight, which is under way."""
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
        except BaseException:  # cancelled: somebody else leads
            self._encoded(key, patient, None)
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
        """The leader's encode ended, well or not."""
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
        flight = self._flights.pop((key, patient))
        flight.brought = brought
        if brought is not None:
            self._kept.keep(key, brought, brought.nbytes)
        flight.landed.set()

    def _count(self, result: Literal["hit", "miss", "shared"]) -> None:
        self._metrics.feature_cache_lookups.labels("memory", result).inc()
