"""Bound how many questions of batches one tenant has in work, so that a batch leaves room for everything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Turns:
    """The turns of one tenant."""

    free: asyncio.Semaphore
    users: int = 0  # that have a turn or wait for one


class BatchTurns:
    """Give each tenant the same number of turns, for all of its batches together. Used from one event loop.

    A question that has its turn still goes through the quota and the scheduler, as every question does.
    """

    def __init__(self, most: int) -> None:
        """`most`: questions of one tenant's batches in work at once."""
        self.most = most
        self._tenants: dict[str, _Turns] = {}

    def __len__(self) -> int:
        """Return the number of tenants that have a turn or wait for one."""
        return len(self._tenants)

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for one of the tenant's turns, and hold it for the block."""
        turns = self._tenants.setdefault(tenant, _Turns(asyncio.Semaphore(self.most)))
        turns.users += 1
        try:
            async with turns.free:
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                del self._tenants[tenant]
