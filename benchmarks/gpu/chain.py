"""Build the whole chain for a GPU, serve it with Triton, and check it with `glimpse verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device
from build_engines.convert import __main__ as build
from build_engines.convert.manifest import NAME
from build_engines.convert.profiles import ON_GPU
from build_engines.verify import __main__ as verify


def verified(device: Device, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Return the report of `glimpse verify`.

    It has parity with FP32 on the CPU, latency by batch size, first token and tokens per second.
    """
    served, fp32, report = work / "onnx-gpu", work / "embedded", work / "verify.json"
    for out, profile in ((fp32, "embedded"), (served, "onnx-gpu")):
        if build.main([str(checkpoint), "--profile", profile, "--out", str(out)]):
            raise SystemExit(f"{profile} of {checkpoint} could not be built")
    if device.kind == "cpu":
        served = on_cpu(served, work / "onnx-gpu-on-cpu")
    verify.main([str(served), "--serve", "--reference", str(fp32), "--report", str(report)])
    return dict(json.loads(report.read_text()))


def on_cpu(repository: Path, copy: Path) -> Path:
    """Copy an `onnx-gpu` repository and change only GPU to CPU in its configurations."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns(NAME))
    for path in copy.glob("*/config.pbtxt"):
        text = path.read_text()
        path.write_text(text.replace(ON_GPU, "kind: KIND_CPU").replace('string_value: "cuda"', 'string_value: "cpu"'))
    return copy
