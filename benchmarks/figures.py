"""Tell a benchmark's figures: on standard output, and in a file if one is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path


def tell(figures: Mapping[str, object], out: Path | None) -> None:
    """Write the figures as JSON. The folder of `out` is made if it is missing."""
    text = json.dumps(figures, indent=2) + "\n"
    sys.stdout.write(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
