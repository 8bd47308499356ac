"""A TCP proxy that passes bytes on until it is told to misbehave."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from enum import Enum

PIECE_BYTES = 65_536


class Way(Enum):
    PASSES = "passes"
    GARBAGE = "garbage"  # the server's bytes are replaced by random ones
    FREEZES = "freezes"  # nothing is passed on, and nothing is closed
    REFUSES = "refuses"  # new connections are closed at once


class Proxy:
    """Listens on one port of 127.0.0.1 and connects to another."""

    def __init__(self, port: int, server_port: int, rng: random.Random) -> None:
        self.port = port
        self.way = Way.PASSES
        self._server_port = server_port
        self._rng = rng
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def close(self) -> None:
        self.reset()
        if self._listener is not None:
            self._listener.close()

    def become(self, way: Way) -> None:
        self.way = way
        if way is Way.FREEZES:
            self._passing.clear()
        else:
            self._passing.set()

    def reset(self) -> int:
        """Cut every connection, both sides, without a goodbye -> how many sides."""
        cut = list(self._writers)
        for writer in cut:
            reset(writer)
        return len(cut)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.way is Way.REFUSES:
            reset(writer)
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            reset(writer)
            return
        sides = {writer, server_writer}
        self._writers |= sides
        try:
            async with asyncio.TaskGroup() as both:  # the end of one side ends the other
                both.create_task(self._pass(reader, server_writer, from_server=False))
                both.create_task(self._pass(server_reader, writer, from_server=True))
        except* OSError:
            pass
        finally:
            self._writers -= sides
            for side in sides:
                reset(side)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_server: bool) -> None:
        """Pass bytes on until one side closes. Raises OSError."""
        while data := await reader.read(PIECE_BYTES):
            await self._passing.wait()
            if from_server and self.way is Way.GARBAGE:
                data = self._rng.randbytes(len(data))
            if writer.transport.is_closing():  # it was reset meanwhile
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


def reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a TCP reset."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
