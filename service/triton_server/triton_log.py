"""Where Triton writes its log: a file, or this process's stderr if the file cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

LOG_BYTES = 10_000_000  # a longer log is renamed at the next start
STDERR = 2

log = structlog.get_logger()


class TritonLog:
    """The log of one Triton, through all its starts."""

    def __init__(self, path: Path | None) -> None:
        """None: stderr is the log."""
        self.path = path
        self._begun: int | None = None  # where this start's lines begin; None if they are not in the file
        self._complaint = ""

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield the descriptor for a start's output. A log that cannot be written is one line and no reason to end."""
        descriptor = self._open()
        try:
            yield descriptor if descriptor is not None else STDERR if sys.stderr else subprocess.DEVNULL
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def last_words(self) -> str:
        """The errors of this start, and where there are more."""
        if self._begun is None or self.path is None:
            return "see Triton's lines on stderr"
        try:
            with self.path.open("rb") as written:
                written.seek(self._begun)
                lines = written.read().decode(errors="replace").splitlines()
        except OSError as exc:
            return f"and its log {self.path} cannot be read ({exc.strerror})"
        # Tables say little, and two errors about CUDA come on every machine without a GPU.
        errors = [line for line in lines if line.startswith(("E", "error:")) and "cuda" not in line.lower()]
        words = "\n  ".join((errors or lines)[-12:])
        return f"see {self.path}; its last errors:\n  {words}"

    def _open(self) -> int | None:
        self._begun = None
        if self.path is None:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                if self.path.stat().st_size > LOG_BYTES:
                    self.path.replace(self.path.with_suffix(".previous.log"))
            # Not blocking: a FIFO without a reader would stop the whole service here.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            self._begun = os.fstat(descriptor).st_size
        except OSError as exc:
            complaint = exc.strerror or str(exc)
            if complaint != self._complaint:
                remedy = "Triton's log goes to stderr. Name a folder that can be written with GLIMPSE_LOG_DIR"
                log.warning("triton_log_not_written", path=str(self.path), error=complaint, remedy=remedy)
            self._complaint = complaint
            return None
        self._complaint = ""
        return descriptor
