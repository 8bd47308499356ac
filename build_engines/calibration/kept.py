"""Keep the answers about each picture in a file, so that a stopped run resumes."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3

from build_engines.calibration.asking import Outcome, Picture, Task
from build_engines.calibration.fitting import Asked
from service.core.confidence import Signals


class Kept:
    """Material by the pictures that it came from: one line of JSON each, in a file of one repository's weights."""

    def __init__(self, path: Path | None) -> None:
        """None keeps nothing. A last line that was not written to its end is asked for again."""
        self._path = path
        self._lines: dict[str, Asked] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if line.endswith(b"\n"):
                told = json.loads(line)
                self._lines[told["key"]] = _asked(told)
                whole += line
        path.write_bytes(whole)

    def get(self, picture: Picture) -> Asked | None:
        return self._lines.get(key_of(picture))

    def put(self, picture: Picture, asked: Asked) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key_of(picture)} | _told(asked)) + "\n")


def key_of(picture: Picture) -> str:
    """Name a picture's file, questions and detail."""
    questions = json.dumps([dataclasses.astuple(task) for task in picture.tasks]).encode()
    return blake3(picture.data + questions + bytes([picture.closely])).hexdigest()


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
        [Outcome(Task(**each["task"]), Signals(**each["signals"]), each["right"]) for each in outcomes],
        bool(told["is_foreign"]),
    )
