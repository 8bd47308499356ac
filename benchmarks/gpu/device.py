"""Wrap the measured device: a GPU, or this CPU, which runs the same code."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import onnxruntime
import torch

FP8_FROM = (8, 9)  # compute capability of the first GPUs that multiply FP8: Ada, then Hopper
WARM_UPS = 3


@dataclass(frozen=True)
class Device:
    """A device; `kind` is its name in PyTorch and ONNX Runtime: `cuda` (the first GPU) or `cpu`."""

    kind: str

    @classmethod
    def of(cls, kind: str) -> Self:
        """Return the device. Raises SystemExit if there is no GPU."""
        if kind == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"PyTorch {torch.__version__} finds no GPU: --device cpu runs the same here, small")
        return cls(kind)

    @property
    def why_no_fp8(self) -> str | None:
        if self.kind == "cuda" and torch.cuda.get_device_capability() < FP8_FROM:
            return f"compute capability {torch.cuda.get_device_capability()}: FP8 begins with {FP8_FROM}"
        return None

    def about(self) -> dict[str, Any]:
        """Return the device's name and the versions of the libraries."""
        versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
        if self.kind == "cpu":
            return {"name": _cpu_name(), "threads": torch.get_num_threads(), **versions}
        told = torch.cuda.get_device_properties(0)
        return {
            "name": told.name,
            "compute_capability": f"{told.major}.{told.minor}",
            "memory_bytes": told.total_memory,
            "cuda": torch.version.cuda,
            **versions,
        }

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Return the peak memory in bytes.

        On a GPU it is PyTorch's since `forget_peak`; on a CPU it is this process's since its start.
        """
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def seconds(self, run: Callable[[], object]) -> float:
        """Measure the seconds of one run, until the device has finished it."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def median_s(self, run: Callable[[], object], repeats: int) -> float:
        """Return the median seconds of `repeats` runs, after warm-ups, which choose kernels and memory."""
        for _ in range(WARM_UPS):
            run()
        return statistics.median(self.seconds(run) for _ in range(repeats))


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
