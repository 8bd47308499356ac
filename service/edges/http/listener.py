"""Accept connections, and refuse those that may not come in before anything is made for them.

uvloop's own listener makes a transport and a protocol before the service learns who calls. A connection that is refused
here costs a twentieth of that. It is left without a response for a while, and then closed. A caller that connects again
at once would otherwise fill the queue of the listening socket, in which other callers wait too.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import structlog

log = structlog.get_logger()

AT_ONCE = 32  # connections accepted before the event loop does something else
PAUSE_S = 0.02  # after AT_ONCE of which most were refused: they cost the loop a bounded share of its time
FULL_PAUSE_S = 1.0  # while the process has no more open files
# What the kernel keeps of a response that the client does not read. By default it keeps megabytes: dozens of responses
# would be made for a client that never reads.
MOST_UNSENT_BYTES = 65536
RELEASE_EVERY_S = 0.1  # connections that were held long enough
TOLD_EVERY_S = 10.0
NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Held:
    """Refused connections: each stays open for a while, without a response. Each is an open file."""

    def __init__(self, most: int, held_s: float) -> None:
        self._most, self._held_s = most, held_s
        self._since: deque[tuple[float, socket.socket]] = deque()
        self._next: asyncio.TimerHandle | None = None

    def add(self, connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        """If that is one too many, close the one that came first."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel keeps the least of what it sends
        self._since.append((loop.time(), connection))
        if len(self._since) > self._most:
            self._close_first()
        elif self._next is None:
            self._next = loop.call_later(RELEASE_EVERY_S, self._release, loop)

    def close(self) -> None:
        """Close all."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        while self._since:
            self._close_first()

    def _close_first(self) -> None:
        self._since.popleft()[1].close()

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._since and loop.time() - self._since[0][0] >= self._held_s:
            self._close_first()
        self._next = loop.call_later(RELEASE_EVERY_S, self._release, loop) if self._since else None


class Listener:
    """One listening socket. uvicorn calls what it needs of an asyncio.Server: `close` and `wait_closed`."""

    def __init__(
        self,
        listening: socket.socket,
        backlog: int,
        made: Callable[[], asyncio.Protocol],
        admits: Callable[[str, float, int], bool],
        held: Held,
    ) -> None:
        """`admits` takes a caller's address, the loop's time, and how many connections are let in but not open yet."""
        self._socket, self._made, self._admits = listening, made, admits
        self._loop = asyncio.get_running_loop()
        self._held = held
        self._opening: set[asyncio.Task[None]] = set()
        self._resumed: asyncio.TimerHandle | None = None
        self._refused = 0  # connections, since the log was told
        self._told_at = float("-inf")
        listening.setblocking(False)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_UNSENT_BYTES)  # connections inherit it
        listening.listen(backlog)
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        if self._resumed is not None:
            self._resumed.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._held.close()

    async def wait_closed(self) -> None:
        """Wait for the connections that are let in but not open yet."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _accept(self) -> None:
        refused, pause_s = 0, 0.0
        for _ in range(AT_ONCE):
            try:
                connection, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as exc:
                if exc.errno not in NO_FILES:
                    raise
                self._held.close()
                log.warning("no_open_files", error=exc.strerror, retry_s=FULL_PAUSE_S)
                pause_s = FULL_PAUSE_S
                break
            if self._admits(address[0] if address else "", self._loop.time(), len(self._opening)):
                task = self._loop.create_task(self._open(connection))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            else:
                self._held.add(connection, self._loop)
                refused += 1
        if refused:
            self._tell(refused)
            if refused > AT_ONCE // 2:
                pause_s = max(pause_s, PAUSE_S)
        if pause_s:
            self._pause(pause_s)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._made, connection)
        except OSError:  # it has gone
            with suppress(OSError):
                connection.close()

    def _pause(self, pause_s: float) -> None:
        self._loop.remove_reader(self._socket)
        self._resumed = self._loop.call_later(pause_s, self._loop.add_reader, self._socket, self._accept)

    def _tell(self, refused: int) -> None:
        self._refused += refused
        now = self._loop.time()
        if now - self._told_at >= TOLD_EVERY_S:
            log.warning("connections_closed", connections=self._refused, reason="all are taken, and more come too fast")
            self._refused, self._told_at = 0, now
