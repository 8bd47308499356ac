"""Calls to Triton that go on to their end, whoever stops listening meanwhile.

A cancel, or a deadline that passes, as Triton 2.51 answers can kill it, and every request that it serves with it: a
segmentation fault in ModelStreamInferHandler::Process, and so in ModelInferHandler's (triton-inference-server/server,
issues 7368 and 8034). So no call is cancelled whose server may still answer. A unary one just ends; a stream, whose
work may be long, is ended in band.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

# How long a stream may go on after each of the stops that it is sent; the first may overtake what it is to stop.
STOP_PAUSES_S = (0.1, 0.4, 1.5, 8.0)
LINGER_S = sum(STOP_PAUSES_S)  # past its deadline a call is cancelled all the same: that server does not answer


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
        """The next response, or grpc.aio.EOF. Raises gRPC's errors, CancelledError where the call was cancelled."""
        response = await self._unread.get()
        if response is grpc.aio.EOF and self._failure is not None:
            raise self._failure
        return response

    async def wind_up(self, stop: Callable[[], grpc.aio.UnaryStreamCall] | None) -> None:
        """Returns once it is over, for which a call of `stop` asks the server. Raises nothing."""
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
