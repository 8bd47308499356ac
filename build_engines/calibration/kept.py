"""Keep the answers about each picture in a file, so that a stopped run resumes."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from blake3 import blake3

from build_engines.calibration.asking import Outcome, Picture, Task
from build_engines.calibration.fitting import Asked
from service.core.confidence import Signals
from service.core.request import Budget


class Kept:
    """Material by the pictures that it came from: one line of JSON each, in a file of one repository's weights.

    Only one process at a time has the file open.
    """

    def __init__(self, path: Path | None) -> None:
        """None keeps nothing. A last line that was not written to its end is cut off, and asked for again.

        Raises ValueError if another process has the file open.
        """
        self._lines: dict[str, Asked] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process uses {path}: wait for it, or choose another --kept") from None
        self._read(self._file)

    def _read(self, file: BinaryIO) -> None:
        whole = 0
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
            with suppress(ValueError, KeyError, TypeError):  # not of this version: asked for again
                told = json.loads(line)
                self._lines[told["key"]] = _asked(told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, picture: Picture, budget: Budget) -> Asked | None:
        return self._lines.get(key_of(picture, budget))

    def put(self, picture: Picture, budget: Budget, asked: Asked) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"key": key_of(picture, budget)} | _told(asked)).encode() + b"\n")
            self._file.flush()


def key_of(picture: Picture, budget: Budget) -> str:
    """Name a picture's file, questions, detail and budget."""
    asked = [[dataclasses.astuple(task) for task in picture.tasks], budget.vision_tokens, budget.visual_tokens]
    return blake3(picture.data + json.dumps(asked).encode() + bytes([picture.closely])).hexdigest()


def _told(asked: Asked) -> dict[str, object]:
    return {
        "summary": base64.b64encode(asked.summary.astype("<f4").tobytes()).decode(),
        "outcomes": [dataclasses.asdict(outcome) for outcome in asked.outcomes],
        "is_foreign": asked.is_foreign,
    }


def _asked(told: dict[str, object]) -> Asked:
    outcomes = told["outcomes"]
    assert isinstance(outcomes, Sequence)
    return Asked(
        np.frombuffer(base64.b64decode(str(told["summary"])), "<f4"),
        [Outcome(_task(each["task"]), Signals(**each["signals"]), each["right"]) for each in outcomes],
        bool(told["is_foreign"]),
    )


def _task(told: Mapping[str, Any]) -> Task:
    return Task(**dict(told) | {"others": tuple(told.get("others", ()))})
