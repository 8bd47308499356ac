"""Speak HTTP/1.1 for the load generator at low CPU cost.

The load generator shares the cores with the system that it measures. This client takes a tenth of httpx's time per
request: no redirects, no cookies, no proxies, keep-alive connections to one address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httptools

Piece = Callable[[bytes], None]  # called with each piece of a body as it arrives


class Aborted(Exception):
    """The client hung up, as requested by `abort_after_s`."""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes


class HttpClient:
    """Send requests, with one connection for each concurrent request."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._idle: list[_Connection] = []

    async def post(
        self,
        path: str,
        body: bytes,
        content_type: str,
        piece: Piece | None = None,
        abort_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a POST request -> its response. Raises OSError, Aborted."""
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: {content_type}\r\n"
            f"{more}content-length: {len(body)}\r\n\r\n"
        )
        return await self.send(head.encode() + body, piece, abort_after_s)

    async def send(self, request: bytes, piece: Piece | None = None, abort_after_s: float | None = None) -> Response:
        """Send bytes as they are and wait for one response. Raises OSError, Aborted."""
        connection = await self._connection()
        try:
            async with asyncio.timeout(abort_after_s):
                response = await connection.exchange(request, piece)
        except TimeoutError as exc:
            if abort_after_s is None:
                raise
            raise Aborted from exc
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.abort()
        return response

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.host, self.port)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[Response] | None = None
        self._piece: Piece | None = None
        self._body: list[bytes] = []

    async def exchange(self, request: bytes, piece: Piece | None) -> Response:
        """Send a request and wait for its response. Raises OSError."""
        if self._transport is None:
            raise ConnectionError("closed")
        self.reusable, self._body, self._piece = False, [], piece
        self._parser = httptools.HttpResponseParser(self)
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.connection_lost(ConnectionError(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable, self._transport = False, None
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("the server hung up"))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        if self._piece is not None:
            self._piece(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue
            return
        self.reusable = self._parser.should_keep_alive() and self._transport is not None
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(Response(status, b"".join(self._body)))
