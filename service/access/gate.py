"""Check callers' keys against the keys in use, and read those again when they change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from service.access.keys import Keyring, KeysError
from service.core.access import Grant
from service.core.errors import Unauthenticated, Unavailable
from service.system.watch import Watch
from service.telemetry.metrics import Metrics

log = structlog.get_logger()

LOOK_INTERVAL_S = 0.25  # a revoked key ends at most so much later, plus the time that reading takes
UNREAD = "the API keys have not been read yet"
IN_REDIS = "redis"  # as GLIMPSE_KEYS: the keys are in GLIMPSE_REDIS_URL


class KeySource(Protocol):
    async def changed(self) -> Keyring | None:
        """Return the keys if they are others than were last read, else None. Raises KeysError."""
        ...

    async def run(self) -> None:
        """Own what `changed` needs, until cancelled."""
        ...


class NoGate:
    """Let everyone in: a service without keys."""

    has_keys = False
    fault = ""

    def grant(self, key: str) -> Grant:  # noqa: ARG002
        return Grant("")


class Gate:
    """Hold the keys in use. If they cannot be read any more, the last ones stay in use."""

    has_keys = True

    def __init__(
        self,
        source: KeySource,
        metrics: Metrics,
        *,
        first: Keyring | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keyring = first  # None until they were read
        self._source = source
        self._metrics = metrics
        self._clock = clock
        self._trouble = ""  # as last logged
        if first is not None:
            self._use(first)

    @property
    def fault(self) -> str:
        return UNREAD if self.keyring is None else ""

    def grant(self, key: str) -> Grant:
        """Return what this key allows. Raises Unauthenticated, Unavailable."""
        if self.keyring is None:
            raise Unavailable(f"{UNREAD}: try again in a few seconds")
        try:
            return self.keyring.grant(key, self._clock())
        except Unauthenticated as refusal:
            self._metrics.keys_refused.labels(refusal.code).inc()
            raise

    async def look(self) -> None:
        """Read the keys if they changed."""
        try:
            keyring = await self._source.changed()
        except KeysError as error:
            self._metrics.keys_readable.set(0)
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("keys_not_read", reason=str(error), in_use=len(self.keyring.keys) if self.keyring else 0)
            return
        if self._trouble:
            self._trouble = ""
            self._metrics.keys_readable.set(1)
            log.info("keys_read_again")
        if keyring is not None:
            self._use(keyring)
            log.info("keys_in_use", keys=len(keyring.keys))

    async def run(self) -> None:
        """Look for changes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._source.run())
            watch = Watch("keys")
            while True:
                with watch.surviving():
                    await self.look()
                await asyncio.sleep(LOOK_INTERVAL_S)

    def _use(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self._metrics.keys_readable.set(1)
        self._metrics.keys.set(len(keyring.keys))
