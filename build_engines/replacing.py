"""Replace a repository as a whole."""

from __future__ import annotations

import os
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
    try:
        yield fresh
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Finish a replacement that was killed."""
    out = out.resolve()
    old = _beside(out, "old")
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def why_not(out: Path) -> str:
    """Return why a folder cannot be replaced, with what to do; empty if it can.

    It must be missing, empty or a repository, so that nothing else is destroyed, and it must be possible to rename it.
    """
    if out.exists() and not (out / "card.json").exists() and any(out.iterdir()):
        return f"{out} is not a model repository and is not empty: choose another folder"
    whole = out.resolve()
    if whole.is_mount():
        return f"{out} is where a volume is mounted, and cannot be renamed: choose a folder in it"
    there = next(parent for parent in whole.parents if parent.exists())
    if not os.access(there, os.W_OK):
        return f"{there} cannot be written, and a repository is made there to take its place: choose another folder"
    return ""


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"
