"""Keep what frozen weights say in a file of the run, so that a resumed stage need not ask them again."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from build_engines.train.stages import device


def load(path: Path, key: str) -> Any:
    """Load what was kept under this key -> it, or None.

    None too if the file is of another key or of none, or if it is cut: earlier versions wrote such files.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location=device(), weights_only=False)
    except (RuntimeError, EOFError, OSError, UnpicklingError):  # by where it was cut
        return None
    return saved["content"] if isinstance(saved, dict) and saved.get("key") == key else None


def save(path: Path, key: str, content: object) -> None:
    """Save atomically: a kill leaves the previous or the new file. key: names the weights and the sizes."""
    partial = path.with_suffix(".partial")
    torch.save({"key": key, "content": content}, partial)
    os.replace(partial, path)
