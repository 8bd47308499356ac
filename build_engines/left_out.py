"""Tell which files and lines of people's data are left out, and why."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

MOST_TOLD = 3  # in a message
FILE = "skipped.txt"  # lists all of them


def told(skipped: Mapping[str, str]) -> str:
    """Say in a line how many are left out, with the first few."""
    few = "; ".join(f"{name}: {reason}" for name, reason in islice(skipped.items(), MOST_TOLD))
    return f"{len(skipped)} files or lines are left out: {few}" + ("; ..." if len(skipped) > MOST_TOLD else "")


def write(skipped: Mapping[str, str], folder: Path) -> None:
    """List all of them in a file of the folder."""
    (folder / FILE).write_text("".join(f"{name}: {reason}\n" for name, reason in sorted(skipped.items())))
