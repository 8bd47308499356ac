"""Tell a benchmark's figures: on standard output, and in a file if one is named."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def tell(figures: Mapping[str, object], out: Path | None) -> None:
    """Write the figures as JSON. The folder of `out` is made if it is missing."""
    text = json.dumps(figures, indent=2) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def command(program: str, arguments: Sequence[str]) -> str:
    """Return the command line that a report names. Where the report was written does not matter."""
    return re.sub(r" --out[ =]\S+", "", " ".join([program, *arguments]))
