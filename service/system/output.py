"""Write the log from a thread of its own, so that neither a full disk nor a slow reader holds up or fails a request.

Lines that the other side does not take are kept up to a limit. Beyond it, and if writing fails, they are lost. When
lines are written again, the log tells how many were lost.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Final

import structlog

MOST_WAITING_BYTES = 4 * 1024 * 1024
CLOSE_S = 1.0  # for the last lines, when the service ends

log = structlog.get_logger()


class Output:
    """Write to file descriptors in order, in one thread. `write` never blocks and never fails."""

    def __init__(self, most_bytes: int = MOST_WAITING_BYTES) -> None:
        self._most_bytes: Final = most_bytes
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._lost = 0
        self._writing = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def write(self, descriptor: int, text: str) -> None:
        """Take text to be written. It is lost if too much waits already."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._waiting_bytes + len(data) > self._most_bytes:
                self._lost += 1
                return
            self._waiting.append((descriptor, data))
            self._waiting_bytes += len(data)
            self._changed.notify_all()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Wait until everything is written, or for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (self._waiting or self._writing) and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                descriptor, data = self._waiting.popleft()
                self._writing = True
            written = write_all(descriptor, data)
            with self._changed:
                self._writing = False
                self._waiting_bytes -= len(data)
                self._lost += not written
                lost, self._lost = (self._lost, 0) if written else (0, self._lost)
                self._changed.notify_all()
            if lost:
                log.warning("log_lines_lost", lines=lost, mend="give the log a disk with room, or a faster reader")


class Stream:
    """What structlog, logging and the greeting write to."""

    def __init__(self, output: Output, descriptor: int | None) -> None:
        """Without a descriptor, because the process was started without one, nothing is written."""
        self._output = output
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        if self._descriptor is not None:
            self._output.write(self._descriptor, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""


def write_all(descriptor: int, data: bytes) -> bool:
    """Write everything, however long it takes -> whether that succeeded."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # another program made the terminal or pipe non-blocking
            time.sleep(0.01)
        except OSError:
            return False
    return True
