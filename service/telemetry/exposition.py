"""Render the metrics for Prometheus, in a bounded share of the event loop's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

OPEN_METRICS = "application/openmetrics-text"
MOST_SHARE = 0.05  # of the loop's time. One rendering takes some milliseconds, in which nothing else runs


def is_open_metrics(accept: str) -> bool:
    """Whether OpenMetrics comes before the newer of Prometheus's own texts, as prometheus_client decides it.

    There are two texts, whatever version or escaping a caller names.
    """
    for each in accept.split(","):
        media_type, *parameters = (part.strip() for part in each.split(";"))
        is_old = any(parameter.startswith("version=0.") for parameter in parameters)
        has_version = any(parameter.startswith("version=") for parameter in parameters)
        if media_type == OPEN_METRICS and not is_old:
            return True
        if media_type == "text/plain" and has_version and not is_old:
            return False
    return False


class Exposition:
    """Render once for all requests that wait. The text is made after they asked, so it is never stale."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.thread_time) -> None:
        """`clock` tells the seconds that a rendering takes."""
        self._registry = registry
        self._clock = clock
        self._waiting: dict[str, tuple[Callable[[CollectorRegistry], bytes], asyncio.Future[bytes]]] = {}  # by type
        self._free_at = 0.0  # by the loop's time: no rendering before
        self._next: asyncio.TimerHandle | None = None

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The text and its media type. OpenMetrics, if `accept` asks for it, has the traces' ids too."""
        encode, media_type = choose_encoder(OPEN_METRICS if is_open_metrics(accept) else "")
        if media_type not in self._waiting:
            self._waiting[media_type] = encode, asyncio.get_running_loop().create_future()
            self._plan()
        _, rendered = self._waiting[media_type]
        return await asyncio.shield(rendered), media_type  # others may wait for it too

    def _plan(self) -> None:
        if self._next is None and self._waiting:
            self._next = asyncio.get_running_loop().call_at(self._free_at, self._render)

    def _render(self) -> None:
        self._next = None
        encode, rendered = self._waiting.pop(next(iter(self._waiting)))
        began = self._clock()
        try:
            rendered.set_result(encode(self._registry))
        except Exception as exc:
            rendered.set_exception(exc)
        self._free_at = asyncio.get_running_loop().time() + (self._clock() - began) / MOST_SHARE
        self._plan()
