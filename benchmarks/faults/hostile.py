"""Callers that mean harm. Each holds on until its block ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from benchmarks.bench.http_client import Aborted, HttpClient
from benchmarks.bombs import BOMBS

HALF_HEADS = 200
ENDLESS_HEADS = 20
ANNOUNCED = 10
ANNOUNCED_BYTES = 20_000_000
DEAF = 20
BOMBS_AT_ONCE = 2
BOMB_S = 30.0

START = b"POST /v1/vqa HTTP/1.1\r\nhost: 127.0.0.1\r\n"
PIPELINED = b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 100


@asynccontextmanager
async def half_heads(port: int, _: random.Random) -> AsyncIterator[list[str]]:
    """Send the first lines of a request, and nothing more."""
    async with _connections(port, HALF_HEADS, START):
        yield []


@asynccontextmanager
async def endless_heads(port: int, _: random.Random) -> AsyncIterator[list[str]]:
    """Send headers without end."""
    async with _connections(port, ENDLESS_HEADS, START, again=b"x-more: " + b"y" * 1000 + b"\r\n"):
        yield []


@asynccontextmanager
async def bodies_never_sent(port: int, _: random.Random) -> AsyncIterator[list[str]]:
    """Announce large bodies."""
    head = START + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % ANNOUNCED_BYTES
    async with _connections(port, ANNOUNCED, head):
        yield []


@asynccontextmanager
async def deaf(port: int, _: random.Random) -> AsyncIterator[list[str]]:
    """Send requests and read no response."""
    async with _connections(port, DEAF, PIPELINED, again=PIPELINED):
        yield []


@asynccontextmanager
async def bombs(port: int, rng: random.Random) -> AsyncIterator[list[str]]:
    """Send images that are small and cost much -> what was answered wrongly, once the block has ended."""
    problems: list[str] = []

    async def send(name: str) -> None:
        data = await asyncio.to_thread(BOMBS[name])
        http = HttpClient("127.0.0.1", port)
        try:
            response = await http.post("/v1/images", data, "application/octet-stream", abort_after_s=BOMB_S)
            if response.status >= 500 and response.status not in (503, 504):
                problems.append(f"{name}: status {response.status}")
        except (Aborted, OSError) as error:
            problems.append(f"{name}: {type(error).__name__}")
        finally:
            http.close()

    async with asyncio.TaskGroup() as sending:
        for name in rng.sample(sorted(BOMBS), BOMBS_AT_ONCE):
            sending.create_task(send(name))
        yield problems


Hostile = Callable[[int, random.Random], contextlib.AbstractAsyncContextManager[list[str]]]
CALLERS: dict[str, Hostile] = {
    "half heads": half_heads,
    "endless headers": endless_heads,
    "bodies announced, never sent": bodies_never_sent,
    "callers that never read": deaf,
    "decoder bombs": bombs,
}


@asynccontextmanager
async def _connections(port: int, number: int, first: bytes, again: bytes = b"") -> AsyncIterator[None]:
    """Open connections, send `first`, and then `again` until the block ends. Nothing is read."""
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []

    async def one() -> None:
        connection = socket.socket()
        sockets.append(connection)
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            await loop.sock_connect(connection, ("127.0.0.1", port))
            await loop.sock_sendall(connection, first)
            while again:
                await loop.sock_sendall(connection, again)
                await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(one()) for _ in range(number)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in sockets:
            connection.close()
