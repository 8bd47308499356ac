"""Replace a repository as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a folder to write, which does not exist yet. It takes the place of `out` if the block ends without error.

    At every moment `out` is whole: old or new. A kill between two renames can leave `out` missing, with a whole copy
    beside it. `recover` repairs that.
    """
    recover(out)
    out = out.resolve()  # a link stays a link
    fresh, old = _beside(out, "new"), _beside(out, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish a replacement that was killed."""
    out = out.resolve()
    old = _beside(out, "old")
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def is_replaceable(out: Path) -> bool:
    """Whether the folder is missing, empty or a repository, so that a replacement destroys nothing else."""
    return not out.exists() or (out / "card.json").exists() or not any(out.iterdir())


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"
