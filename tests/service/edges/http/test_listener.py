"""When the listener accepts again, after refusals and without open files."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from service.edges.http.listener import AT_ONCE, FULL_PAUSE_S, Held, Listener

CALLERS = AT_ONCE // 2 + 1  # refused, they are enough for the short pause


class Few(socket.socket):
    """A listening socket whose process has files for CALLERS connections only."""

    left = CALLERS

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.left -= 1
        return super().accept()


class Watched(asyncio.SelectorEventLoop):
    """A loop that remembers when its listener is to accept again."""

    def __init__(self) -> None:
        super().__init__()
        self.resumed: list[tuple[float, asyncio.TimerHandle]] = []
        self.paused = asyncio.Event()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        handle = super().call_later(delay, callback, *args, **kwargs)
        if callback == self.add_reader:
            self.resumed.append((delay, handle))
            self.paused.set()
        return handle


def test_without_open_files_it_pauses_once_and_a_closed_listener_never_resumes() -> None:
    async def main() -> list[tuple[float, asyncio.TimerHandle]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Watched)
        with ExitStack() as callers:
            listening = callers.enter_context(Few())
            listening.bind(("127.0.0.1", 0))
            listening.listen(2 * CALLERS)
            for _ in range(CALLERS + 1):
                callers.enter_context(socket.create_connection(listening.getsockname()))
            listener = Listener(listening, 2 * CALLERS, asyncio.Protocol, lambda *_: False, Held(CALLERS, 10.0))
            await asyncio.wait_for(loop.paused.wait(), 30)
            listener.close()
        return loop.resumed

    with asyncio.Runner(loop_factory=Watched) as runner:
        resumed = runner.run(main())
    assert [pause_s for pause_s, _ in resumed] == [FULL_PAUSE_S]
    assert all(handle.cancelled() for _, handle in resumed)
