"""Make what takes long and several test files need: once in a run, in the first process that needs it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the same block meanwhile."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Once:
    """Folders by name, which every worker of the run sees. Nobody changes one that is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of this name; `make` fills it if no process has done so."""
        made, partial = self.folder / name, self.folder / f"{name}.partial"
        with locked(self.folder / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(partial, ignore_errors=True)  # left by a test that failed
                partial.mkdir()
                make(partial)
                partial.rename(made)
        return made


def of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Once:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # a worker has a folder of its own in the run's
    folder = base / "once"
    folder.mkdir(exist_ok=True)
    return Once(folder)
