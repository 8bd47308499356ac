"""Name weights and the files beside them by a digest, so that what was computed with others is not taken for theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

DIGITS = 16
# In the names of weights that a visual token depends on; `Checkpoint.visual_fingerprint` covers them.
VISUAL = ("vision_model.", "qformer.", "query_tokens", "language_projection.", "perceiver_resampler.")
PIECE_BYTES = 1 << 24


def of_modules(*modules: nn.Module, about: str = "") -> str:
    """16 hex digits over the modules' weights and a text about them."""
    digest = hashlib.sha256(about.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def of_parts(*parts: str | bytes) -> str:
    """16 hex digits over texts and bytes, each apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:DIGITS]


def of_language_files(directory: Path, other_files: Iterable[str]) -> str:
    """16 hex digits over the language model's weights as the files have them, whether they are loaded or not.

    `other_files` are no part of it. A file that has not changed is read once in a process.
    """
    paths = [path for path in sorted(directory.glob("*.safetensors")) if path.name not in set(other_files)]
    read = _tensors if paths else _whole
    paths = paths or sorted(directory.glob("pytorch_model*.bin"))
    return read(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@cache
def _tensors(files: tuple[tuple[Path, int, int], ...]) -> str:
    """By name: how they are spread over files says nothing."""
    readers: dict[str, Callable[[str], torch.Tensor]] = {}
    for path, *_ in files:
        opened = safe_open(path, framework="pt")
        readers |= dict.fromkeys(opened.keys(), opened.get_tensor)
    digest = hashlib.sha256()
    for name in sorted(name for name in readers if not any(part in name for part in VISUAL)):
        tensor = readers[name](name).contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


@cache
def _whole(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()[:DIGITS]
