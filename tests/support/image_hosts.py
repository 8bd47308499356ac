"""Servers to fetch images from: real sockets, real TLS, and a count of the connections that each got."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trustme

Answer = bytes | Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """An HTTP/1.1 response with a length, which may lie."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return response(b"", f"location: {to}", status=status)


@dataclass
class ImageHost:
    """A server at one address. `requests` holds the head of each request, `connections` counts what came at all."""

    tls: ssl.SSLContext | None
    address: str
    port: int
    answers: dict[str, Answer] = field(default_factory=dict)  # by path
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)  # that TLS was asked for
    serving: set[asyncio.Task[object]] = field(default_factory=set)  # connections that are open

    def forget(self) -> None:
        self.answers.clear()
        self.requests.clear()
        self.names.clear()
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if (task := asyncio.current_task()) is not None:
            self.serving.add(task)
            task.add_done_callback(self.serving.discard)
        try:
            if self.tls is not None:
                await writer.start_tls(self.tls)
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            path = head.split(b" ")[1].decode().partition("?")[0]
            answer = self.answers.get(path, response(b"", status="404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except (asyncio.IncompleteReadError, OSError):  # the client went away
            pass
        finally:
            writer.close()

    def note_name(self, _: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        self.names.append(name)


@asynccontextmanager
async def image_host(
    address: str, port: int = 0, authority: trustme.CA | None = None, names: Sequence[str] = ()
) -> AsyncIterator[ImageHost]:
    """A running server; with TLS if there is an authority, whose certificate is for the names."""
    host = ImageHost(None, address, port)
    if authority is not None:
        host.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(*names).configure_cert(host.tls)
        host.tls.sni_callback = host.note_name
    server = await asyncio.start_server(host.serve, address, port)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()
        for task in host.serving:  # a client that went away is not always noticed
            task.cancel()
        await asyncio.gather(*host.serving, return_exceptions=True)


class Names:
    """A resolver of our own: each look-up of a name takes its next answer, and the last one stays."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._answers = {name: list(lists) for name, lists in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if answers is None:
            raise OSError(f"no such name: {host}")
        return answers.pop(0) if len(answers) > 1 else answers[0]
