"""Read a system's CPU seconds and memory by process from Linux's /proc.

A process is named by its role: `gateway`, `decoder`, `triton`, `llm`, `vision_encoder`, ... in Glimpse, `server` and
`worker` in other systems.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
DECODER = "decoder"  # a gateway has several; they come and go
GATEWAYS = {"service", "benchmarks.bench.orders"}  # what `python -m` runs
SERVERS = {"benchmarks.bench.naive", "benchmarks.bench.litserve_server"}


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    role: str
    cpu_s: float
    rss_bytes: int
    threads: int
    descriptors: int


def family(pid: int) -> list[Process]:
    """Return a process and its descendants, without those that end during the call."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if fields := _fields(int(stat.parent.name)):
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        member = left.pop(0)
        left += parents.get(member, [])
        fields = _fields(member)
        try:
            descriptors = len(list(Path(f"/proc/{member}/fd").iterdir()))
        except OSError:
            continue
        if fields and fields[0] != "Z":
            cpu_s = (int(fields[11]) + int(fields[12])) / TICKS
            found.append(Process(member, _role(member), cpu_s, int(fields[21]) * PAGE, int(fields[17]), descriptors))
    return found


def shared_regions(pid: int) -> set[str]:
    """Return the files under /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/dev/shm/" in line}


def cpu_by_role(before: list[Process], after: list[Process]) -> dict[str, float]:
    """Return CPU seconds spent between two moments; a new process counts from its start."""
    then = {process.pid: process.cpu_s for process in before}
    spent: Counter[str] = Counter()
    for process in after:
        spent[process.role] += process.cpu_s - then.get(process.pid, 0.0)
    return dict(spent)


def memory_by_role(processes: list[Process]) -> dict[str, float]:
    """Return resident memory in MB; shared pages count in each process."""
    held: Counter[str] = Counter()
    for process in processes:
        held[process.role] += process.rss_bytes / 1e6
    return dict(held)


def proportional_bytes(process: Process) -> int:
    """Return the process's memory with its share of shared pages (PSS), or its resident memory if the kernel hides it.

    The kernel visits every page of the process for it, so it is not for sampling.
    """
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return process.rss_bytes
    found = re.search(r"^Pss: +(\d+) kB$", rollup, re.MULTILINE)
    return int(found[1]) * 1024 if found else process.rss_bytes


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on.

    Indices: state 0, parent 1, utime 11, stime 12, threads 17, rss 21.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _role(pid: int) -> str:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return "other"
    return role_of(arguments)


def role_of(arguments: Sequence[str]) -> str:
    """Return the role of the process with this command line."""
    program = Path(arguments[0]).name
    if program == "tritonserver":
        return "triton"
    if program == "triton_python_backend_stub":  # its arguments: MODEL/1/model.py, ...
        return Path(arguments[1]).parent.parent.name
    if "service.media.worker" in arguments:
        return DECODER
    if GATEWAYS.intersection(arguments):
        return "gateway"
    if SERVERS.intersection(arguments):
        return "server"
    return "worker"
