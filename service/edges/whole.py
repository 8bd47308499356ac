"""Collect the whole answer of one question, for every transport."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from service.core.answer import Delta, Finished


async def whole(events: AsyncGenerator[Delta | Finished, None]) -> tuple[Delta, Finished]:
    """Return an answer's text, which may be empty, and its end. Raises what `events` does, and closes it."""
    deltas: list[Delta] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                deltas.append(event)
            else:
                end = event
    text = "".join(delta.text for delta in deltas)
    return Delta(text, tuple(token for delta in deltas for token in delta.log_probs)), end
