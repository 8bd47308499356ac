"""An LRU cache in process memory, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Lru(Generic[Key, Value]):
    def __init__(self, max_bytes: int, size: Gauge, evictions: Counter) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._size = size
        self._evictions = evictions
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        """Does not count as use."""
        return key in self._kept

    def get(self, key: Key) -> Value | None:
        """Counts as use."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def keep(self, key: Key, value: Value, nbytes: int) -> None:
        """Keep the value and evict others. A value larger than the whole cache is not kept."""
        if nbytes > self.max_bytes:
            return
        _, before = self._kept.pop(key, (None, 0))
        self._kept[key] = value, nbytes
        self.nbytes += nbytes - before
        while self.nbytes > self.max_bytes:
            _, (_, gone) = self._kept.popitem(last=False)
            self.nbytes -= gone
            self._evictions.inc()
        self._size.set(self.nbytes)
