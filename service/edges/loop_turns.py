"""Begin few requests in each turn of the event loop, so that what else has come is not held up by those that wait."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 8  # requests that begin in one turn of the loop


class LoopTurns:
    """Let requests begin in order of arrival, AT_ONCE in a turn of the loop.

    To read a question takes one to two milliseconds of the loop, and a refusal before it a tenth of one. If a crowd
    comes at once and all of it is read in one turn, nothing else is received or sent until the last is read. Between
    two turns the loop does all else that is due.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()  # each with the time since when
        self._begun = 0  # in this turn of the loop

    @property
    def waited_s(self) -> float:
        """Return how long the next request has waited; 0 if none waits."""
        return asyncio.get_running_loop().time() - self._waiting[0][0] if self._waiting else 0.0

    async def next(self) -> None:
        """Wait for a turn with room. While few come, there is room at once."""
        loop = asyncio.get_running_loop()
        if self._begun < AT_ONCE and not self._waiting:
            if not self._begun:
                loop.call_soon(self._pass_on)
            self._begun += 1
            return
        room = loop.create_future()
        self._waiting.append((loop.time(), room))
        await room

    def _pass_on(self) -> None:
        """Give this turn's room to those that wait."""
        self._begun = 0
        while self._waiting and self._begun < AT_ONCE:
            _, room = self._waiting.popleft()
            if not room.done():  # else its request was cancelled
                room.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._pass_on)
