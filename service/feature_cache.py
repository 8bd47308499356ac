"""What the vision encoder found, kept in process memory: least recently used first to go, bounded in bytes.

Requests for one new image share one encode: the first one leads, the others wait for what it brings. A leader that
fails or goes away hands over to one of them, so nobody waits for somebody who has left.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from service.core import VisionFeatures
from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class FeatureKey:
    """Equal keys mean equal features."""

    fingerprint: str  # of the vision encoder's weights
    view: int  # pixels a side that the encoder saw
    digest: str  # blake3 of the image's bytes


@dataclass(slots=True)
class Found:
    """What a lookup brought. Without features the caller leads: it encodes and then calls `keep`."""

    features: VisionFeatures | None
    result: Literal["hit", "miss", "shared"]
    brought: VisionFeatures | None = None

    def keep(self, features: VisionFeatures) -> None:
        self.brought = features


@dataclass(slots=True)
class Flight:
    """One encode under way. `brought` stays empty where its leader failed."""

    landed: asyncio.Event = field(default_factory=asyncio.Event)
    brought: VisionFeatures | None = None


class FeatureCache:
    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._metrics = metrics
        self._kept: OrderedDict[FeatureKey, VisionFeatures] = OrderedDict()
        self._flights: dict[FeatureKey, Flight] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @asynccontextmanager
    async def find(self, key: FeatureKey) -> AsyncIterator[Found]:
        """Features that are kept or that a flight under way brings; else the caller leads the flight in the block."""
        found = await self._kept_or_shared(key)
        self._metrics.feature_cache_lookups.labels(found.result).inc()
        if found.features is not None:
            yield found
            return
        flight = self._flights[key] = Flight()
        try:
            yield found
        finally:
            del self._flights[key]
            if found.brought is not None:
                flight.brought = found.brought
                self._keep(key, found.brought)
            flight.landed.set()

    async def _kept_or_shared(self, key: FeatureKey) -> Found:
        while True:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return Found(kept, "hit")
            if (flight := self._flights.get(key)) is None:
                return Found(None, "miss")
            await flight.landed.wait()
            if flight.brought is not None:
                return Found(flight.brought, "shared")

    def _keep(self, key: FeatureKey, features: VisionFeatures) -> None:
        if features.nbytes > self.max_bytes:
            return
        self._kept[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            _, gone = self._kept.popitem(last=False)
            self.nbytes -= gone.nbytes
            self._metrics.feature_cache_evictions.inc()
        self._metrics.feature_cache_bytes.set(self.nbytes)
