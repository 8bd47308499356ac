"""Read streams from Triton, and end them with a message (in band) instead of a cancel.

If a call is cancelled or passes its deadline while Triton 2.51 answers it, Triton can die with all its requests. It is
a segmentation fault in ModelStreamInferHandler::Process or ModelInferHandler::Process
(triton-inference-server/server, issues 7368 and 8034). So a call is not cancelled as long as its server may still
answer. A unary call runs to its end. The work of a stream may be long, so a second message tells the model to stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

# Wait after each stop message before the next one. The first may arrive before the request that it stops.
STOP_PAUSES_S = (0.1, 0.4, 1.5, 8.0)
LINGER_S = sum(STOP_PAUSES_S)  # time after a call's deadline; then it is cancelled, as its server does not answer


class Stream:
    """Read the responses to one decoupled request, in order."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self.call = call
        self.reader = asyncio.create_task(self._read_on())
        self._unread: asyncio.Queue[Any] = asyncio.Queue()
        self._failure: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Return whether the server has ended the stream, or it failed."""
        return self.reader.done()

    async def read(self) -> Any:
        """Return the next response, or grpc.aio.EOF.

        Raises gRPC's errors, and CancelledError if the call was cancelled.
        """
        response = await self._unread.get()
        if response is grpc.aio.EOF and self._failure is not None:
            raise self._failure
        return response

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
                self._unread.put_nowait(response)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.CancelledError) as error:
            self._failure = error
        self._unread.put_nowait(grpc.aio.EOF)
