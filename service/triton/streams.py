"""Streams to Triton, which are ended in band and not cancelled.

A cancel or a passed deadline while Triton 2.51 answers can kill it with every request that it serves: a segmentation
fault in ModelStreamInferHandler::Process or ModelInferHandler::Process (triton-inference-server/server, issues 7368 and
8034). So a call is not cancelled as long as its server may still answer. A unary call runs to its end. The work of a
stream may be long, so a second message tells the model to stop it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

# How long to wait after each stop before the next one; the first may arrive before the request that it stops.
STOP_PAUSES_S = (0.1, 0.4, 1.5, 8.0)
LINGER_S = sum(STOP_PAUSES_S)  # after its deadline; then a call is cancelled, as its server does not answer


class Stream:
    """The responses to one decoupled request, in order."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self.call = call
        self.reader = asyncio.create_task(self._read_on())
        self._unread: asyncio.Queue[Any] = asyncio.Queue()
        self._failure: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether the server has ended it, or it failed."""
        return self.reader.done()

    async def read(self) -> Any:
        """The next response, or grpc.aio.EOF. Raises gRPC's errors, and CancelledError if the call was cancelled."""
        response = await self._unread.get()
        if response is grpc.aio.EOF and self._failure is not None:
            raise self._failure
        return response

    async def wind_up(self, stop: Callable[[], grpc.aio.UnaryStreamCall] | None) -> None:
        """Ask the server to end it, by calls of `stop`; returns when it is over. Raises nothing."""
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
                self._unread.put_nowait(response)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.CancelledError) as error:
            self._failure = error
        self._unread.put_nowait(grpc.aio.EOF)
