"""Read streams from Triton, and end them with a message (in band) instead of a cancel.

If a call is cancelled or passes its deadline while Triton 2.51 answers it, Triton can die with all its requests. It is
a segmentation fault in ModelStreamInferHandler::Process or ModelInferHandler::Process
(triton-inference-server/server, issues 7368 and 8034). So a call is not cancelled as long as its server may still
answer. A unary call runs to its end. The work of a stream may be long, so a second message tells the model to stop.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

# Wait after each stop message before the next one. The first may arrive before the request that it stops.
STOP_PAUSES_S = (0.1, 0.4, 1.5, 8.0)
LINGER_S = sum(STOP_PAUSES_S)  # time after a call's deadline; then it is cancelled, as its server does not answer


class Silent(TimeoutError):
    """No response has followed the last one for too long."""


class Stream:
    """Read the responses to one decoupled request, in order.

    One timer watches both limits of its reader. It runs until the earliest moment at which a wait can be over, and then
    again from the wait that goes on: a timeout of its own for each response would cost more than the response.
    """

    def __init__(
        self, call: grpc.aio.UnaryStreamCall, timeout_s: float = math.inf, stall_timeout_s: float = math.inf
    ) -> None:
        """`timeout_s` is for all responses; `stall_timeout_s` for each but the first, which waits in a queue."""
        self.call = call
        self.reader = asyncio.create_task(self._read_on())
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._unread: deque[Any] = deque()
        self._wanted: asyncio.Future[None] | None = None  # while somebody waits for a response
        self._limit = self._deadline  # of that wait
        self._timer: asyncio.TimerHandle | None = None
        self._is_answering = False  # a response has come
        self._failure: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Return whether the server has ended the stream, or it failed."""
        return self.reader.done()

    async def read(self) -> Any:
        """Return the next response, or grpc.aio.EOF.

        Raises gRPC's errors, CancelledError if the call was cancelled, Silent, and TimeoutError after `timeout_s`.
        """
        if not self._unread:
            await self._next_response()
        response = self._unread.popleft()
        if response is grpc.aio.EOF and self._failure is not None:
            raise self._failure
        return response

    def close(self) -> None:
        """Let go of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _next_response(self) -> None:
        stall_at = self._loop.time() + self._stall_timeout_s if self._is_answering else math.inf
        self._limit = min(self._deadline, stall_at)
        if self._limit < math.inf and (self._timer is None or self._timer.when() > self._limit):
            self._watch()
        self._wanted = self._loop.create_future()
        try:
            await self._wanted
        finally:
            self._wanted = None

    def _watch(self) -> None:
        self.close()
        self._timer = self._loop.call_at(self._limit, self._look)

    def _look(self) -> None:
        """End a wait that is over its limit, or look again at that limit."""
        self._timer = None
        if self._wanted is None or self._wanted.done():
            return  # the next wait sets a timer
        if self._loop.time() < self._limit:
            self._watch()
        else:
            self._wanted.set_exception(TimeoutError() if self._limit == self._deadline else Silent())

    def _put(self, response: Any) -> None:
        self._unread.append(response)
        self._is_answering = True
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def wind_up(self, stop: Callable[[], grpc.aio.UnaryStreamCall] | None) -> None:
        """Ask the server to end the stream, by calls of `stop`, and wait until it is over. Raises nothing."""
        streams = [self]
        for pause_s in STOP_PAUSES_S:
            if stop is not None and not self.is_over:
                streams.append(Stream(stop()))
            await asyncio.wait([stream.reader for stream in streams], timeout=pause_s)
            if all(stream.is_over for stream in streams):
                return
        for stream in streams:
            stream.call.cancel()

    async def _read_on(self) -> None:
        try:
            while (response := await self.call.read()) is not grpc.aio.EOF:
                self._put(response)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.CancelledError) as error:
            self._failure = error
        self._put(grpc.aio.EOF)
