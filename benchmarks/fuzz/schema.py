"""schemathesis against a running service: examples from its OpenAPI, and links between operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run(url: str, examples: int, seed: int, folder: Path) -> dict[str, Any]:
    raise NotImplementedError
