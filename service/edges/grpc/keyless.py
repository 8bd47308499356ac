"""Bound the calls that need no key, so that they never take the places of those that do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

import grpc  # type: ignore[import-untyped]


@dataclass(slots=True)
class KeylessCall:
    """Hold one call and the status that it ends with."""

    context: grpc.aio.ServicerContext
    status: str = "UNKNOWN"  # of a fault, as gRPC answers it

    async def abort(self, code: grpc.StatusCode, told: str) -> NoReturn:
        """End the call. gRPC itself does not tell later with what."""
        self.status = code.name
        await self.context.abort(code, told)
        raise AssertionError("abort raises")


class KeylessCalls:
    """Hold the open calls of one method: how many there may be, and for how long each."""

    def __init__(self, method: str, most: int, longest_s: float, count: Callable[[str, str], None]) -> None:
        self._method = method
        self._most = most
        self._longest_s = longest_s
        self._count = count
        self._open = 0

    @asynccontextmanager
    async def one(self, context: grpc.aio.ServicerContext) -> AsyncIterator[KeylessCall]:
        """Refuse the call if too many are open, and end it if it takes too long. Count it by its status, once.

        The block reads the call's messages: gRPC itself would wait for them without an end.
        """
        call = KeylessCall(context)
        try:
            if self._open >= self._most:
                told = f"{self._most} calls of {self._method} are open, and no more may be: try again later"
                await call.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, told)
            self._open += 1
            # Not when the block ends: a client that reads nothing keeps its call open until its connection ends.
            context.add_done_callback(self._ended)
            try:
                async with asyncio.timeout(self._longest_s):
                    yield call
            except TimeoutError:
                told = f"a call of {self._method} may be open for {self._longest_s:g} s: make another one"
                await call.abort(grpc.StatusCode.UNAVAILABLE, told)
            call.status = "OK"
        except asyncio.CancelledError:  # the caller has gone
            call.status = "CANCELLED"
            raise
        finally:
            self._count(self._method, call.status)

    def _ended(self, _: object) -> None:
        self._open -= 1
