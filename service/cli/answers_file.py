"""Keep a batch's answers in a file that survives the end of the program, even a kill."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.cli.client import AskFailed


@dataclass(slots=True)
class AnswersFile:
    """Append answers to a file, one line of JSON each. What `append` has written is on the disk when it returns."""

    path: Path
    descriptor: int
    answered: dict[int, str] = field(default_factory=dict)  # by line of the questions: the digest of what was asked

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[AnswersFile]:
        """Open or create the file for this program alone, and read what it has. Raises AskFailed."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as exc:
            raise AskFailed(f"cannot write {path}: {exc.strerror}") from exc
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise AskFailed(f"another program writes to {path}: wait for it, or choose another --out") from exc
            answers = cls(path, descriptor)
            answers._read()
            yield answers
        finally:
            os.close(descriptor)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write these lines, and wait until the disk has them. Raises AskFailed."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        data = memoryview(lines.encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON's \udxxx
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
            os.fsync(self.descriptor)
        except OSError as exc:
            raise AskFailed(f"cannot write {self.path}: {exc.strerror}; run the same command again to go on") from exc
        self.answered.update((record["line"], record["asked"]) for record in records)

    def _read(self) -> None:
        """Read the answers, and cut off a last line that was not written to its end. Raises AskFailed."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.answered[int(record["line"])] = str(record["asked"])
            except (ValueError, LookupError, TypeError) as exc:
                if number == len(lines) and not line.strip(b"\0 "):  # the power failed before the disk had it
                    whole -= len(line) + 1
                    continue
                raise AskFailed(
                    f"line {number} of {self.path} is none of a batch's answers: choose another --out"
                ) from exc
        if whole < len(data):
            os.ftruncate(self.descriptor, whole)
            os.fsync(self.descriptor)
