"""How late the event loop is: the time by which what is due waits for what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.1


async def watch_loop(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Observe, each interval, by how many seconds the loop woke this task too late. Runs until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
