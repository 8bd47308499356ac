"""Let few questions be parsed in one turn of the event loop, so that a crowd does not hold up everything else."""

from __future__ import annotations

import asyncio
from collections import deque

AT_ONCE = 8  # questions in one turn of the loop


class LoopTurns:
    """Let requests go on in order of arrival, AT_ONCE in a turn of the loop.

    Parsing a question, and its way to the first wait, take about a millisecond of the loop. A refusal at the door takes
    much less. If the loop parsed a whole crowd in one turn, it would receive and send nothing until the last was
    parsed. Between two turns the loop does all else that is due.
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
