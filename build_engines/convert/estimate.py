"""Check before a build starts that the machine has enough memory and disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_engines.convert.options import Options, Refused
from build_engines.repository import CLIP_GRAPH, CLIP_LLM, MOST_INLINE_BYTES

FIXED_BYTES = 1_500_000_000  # PyTorch, transformers and the exporter themselves
FOR_CLIPS = (CLIP_GRAPH, CLIP_LLM)
CALIBRATION_BYTES = 1_000_000  # of one image: pixels, vision tokens and intermediate values


@dataclass(frozen=True)
class Needs:
    """Memory and disk of a build, in bytes."""

    disk: int
    memory: int


def needs(options: Options, parameters: Mapping[str, int]) -> Needs:
    """Estimate the build's memory and disk. `parameters` are counts by component.

    Memory: the checkpoint in FP32, and the most that one graph needs. A graph's weights count five times if they are
    inside the ONNX file (during export), else twice (during a run). `python -m benchmarks.real_scale` measures exports.
    Disk: every step keeps its output. The repository consists of hard links to it.
    """
    left_out = {"embedded": (), "onnx-gpu": FOR_CLIPS, "tensorrt": ("llm", *FOR_CLIPS)}[options.profile]
    exported = {name: count for name, count in parameters.items() if name not in left_out}
    weights = [4 * count for count in exported.values()]
    graph = max(held * (5 if held <= MOST_INLINE_BYTES else 2) for held in weights)
    memory = FIXED_BYTES + 4 * sum(parameters.values()) + graph
    disk = 4 * sum(exported.values())
    if options.precision != "fp32":  # a graph of BF16 is one of FP32 that rounds
        disk += (4 if options.precision == "bf16" else 2) * sum(exported.values())
    if options.precision == "fp8":
        disk += 4 * sum(exported.values()) + options.calibration_images * CALIBRATION_BYTES
    if options.profile == "tensorrt":
        disk += 2 * sum(exported.values())  # plans
        disk += 3 * 2 * parameters["llm"]  # converted checkpoint, its plain copy, engine
    return Needs(disk=disk + 100_000_000, memory=memory)


def check(
    options: Options,
    parameters: Mapping[str, int],
    stays: Mapping[str, bool] | None = None,
    free_disk: int | None = None,
    free_memory: int | None = None,
) -> Needs:
    """Return what the build needs. Raises Refused if the machine has less.

    `stays` is as for `reusable`. Free disk and memory are looked up if not given.
    """
    wanted = needs(options, parameters)
    disk = shutil.disk_usage(_existing(options.work)).free if free_disk is None else free_disk
    disk += reusable(options.work, stays)
    if disk < wanted.disk:
        raise Refused(
            f"the build needs {gigabytes(wanted.disk)} of disk at {options.work}; {gigabytes(disk)} are free. "
            "Free some, or choose --out on a larger disk"
        )
    memory = available_memory() if free_memory is None else free_memory
    if memory < wanted.memory:
        raise Refused(
            f"the build needs {gigabytes(wanted.memory)} of memory; {gigabytes(memory)} are free. "
            "Use a machine with more memory"
        )
    return wanted


def reusable(work: Path, stays: Mapping[str, bool] | None = None) -> int:
    """Count the bytes in the build folder that need no more disk: output that stays, and what a build frees.

    `stays` says of each step's folder whether its output stays; None: not known yet, so everything may. Another output
    is freed only if nothing else links to it: the repository links to what it was built of. A file counts once.
    """
    links: Counter[int] = Counter()
    files: dict[int, os.stat_result] = {}
    kept = set()
    for path in (path for path in work.rglob("*") if path.is_file()):
        folder = path.relative_to(work).parts[0].removesuffix(".partial")
        if stays is None or folder in stays:
            told = path.stat()
            links[told.st_ino] += 1
            files[told.st_ino] = told
            if stays is None or stays[folder]:
                kept.add(told.st_ino)
    return sum(told.st_size for inode, told in files.items() if inode in kept or links[inode] == told.st_nlink)


def available_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a new process can allocate, by the kernel and by the container's limit."""
    fields = dict(line.split(":", 1) for line in proc.read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        held = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used -= int(held["inactive_file"])  # cache of files read earlier, which the kernel frees on demand
    except (OSError, ValueError, KeyError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _existing(path: Path) -> Path:
    """The path, or the nearest existing folder above it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
