"""Find out what this machine builds plans and engines with: its GPU, and TensorRT's packages."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata

from build_engines.convert.options import HERE

QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")


def gpu() -> str:
    """The first GPU's name and compute capability, "NVIDIA H100 80GB HBM3, 9.0"; empty if there is none."""
    if shutil.which(QUERY[0]) is None:
        return ""
    asked = subprocess.run(QUERY, capture_output=True, text=True, check=False)
    return "" if asked.returncode else next(iter(asked.stdout.splitlines()), "").strip()


def installed() -> dict[str, str]:
    """Versions of the packages of HERE that are installed, by name."""
    found = {}
    for name in HERE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
