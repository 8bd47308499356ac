"""Tell a benchmark's figures: on standard output, and in a file if one is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def tell(figures: Mapping[str, object], out: Path | None) -> None:
    """Write the figures and the commit as JSON. The folder of `out` is made if it is missing."""
    text = json.dumps({"commit": commit()} | dict(figures), indent=2) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def command(program: str, arguments: Sequence[str]) -> str:
    """Return the command line that a report names. Where the report was written does not matter."""
    return re.sub(r" --out[ =]\S+", "", " ".join([program, *arguments]))


def commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if files were changed since; None if git does not know."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        said = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()
