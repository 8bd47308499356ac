"""ONNX Runtime sends nothing to its maker, and leaves no session file of its telemetry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import PROJECT

IMPORTS = [
    "triton_models.session",  # of every model with a graph
    pytest.param("build_engines.convert.parity", marks=pytest.mark.slow),  # imports PyTorch
    "benchmarks.bench.engine",
]


def left_by(code: str, folder: Path) -> list[str]:
    """What a Python process that runs this leaves in its temporary folder."""
    # Nothing of this process's own environment: ONNX Runtime is silent by itself where CI is set.
    environment = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), str(folder))
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, check=True, timeout=120)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("module", IMPORTS)
def test_telemetry_is_off(module: str, tmp_path: Path) -> None:
    assert ".ses" not in left_by(f"import {module}", tmp_path)


def test_onnx_runtime_alone_leaves_its_telemetry(tmp_path: Path) -> None:
    """The case that the others are measured against; if it fails, a newer ONNX Runtime may need no switch any more."""
    assert ".ses" in left_by("import onnxruntime", tmp_path)
