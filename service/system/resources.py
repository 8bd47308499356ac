"""Measure what this process and those that it started take of the machine, for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class MemoryFiles:
    """Where a control group of one version tells its memory. `unused` is the line of page cache that nothing needs."""

    used: str
    limit: str
    stat: str
    unused: str


# In a container the control group is mounted at the root, whatever its path is outside.
VERSION_2 = MemoryFiles("memory.current", "memory.max", "memory.stat", "inactive_file")
VERSION_1 = MemoryFiles(
    "memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "memory/memory.stat", "total_inactive_file"
)
NO_LIMIT_BYTES = 2**60  # version 1 writes a number near 2^63 if there is no limit


@dataclass(frozen=True, slots=True)
class Memory:
    """What a container uses of its memory, without page cache that can be dropped, and its limit."""

    used_bytes: int
    limit_bytes: int


def memory_of_container(root: Path) -> Memory | None:
    """Read the control group's files; None if it has no limit or cannot be read."""
    for files in (VERSION_2, VERSION_1):
        try:
            limit = (root / files.limit).read_text().strip()
            used_bytes = int((root / files.used).read_text())
            stat = dict(line.split() for line in (root / files.stat).read_text().splitlines())
        except OSError:
            continue
        if limit == "max" or int(limit) >= NO_LIMIT_BYTES:
            return None
        return Memory(max(0, used_bytes - int(stat.get(files.unused, 0))), int(limit))
    return None


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the machine. `started`, in ticks since boot, tells two processes with the same id apart."""

    pid: int
    parent: int
    started: int
    cpu_ticks: int


def processes(proc: Path) -> Iterator[Process]:
    """Read every process that can be read."""
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # The name stands in brackets and may hold anything, brackets too.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        yield Process(int(folder.name), int(fields[1]), int(fields[19]), int(fields[11]) + int(fields[12]))


class CpuTime:
    """Add up the CPU time of a process and its descendants. It never falls: ended processes stay in the sum."""

    def __init__(self, pid: int, proc: Path) -> None:
        self._pid = pid
        self._proc = proc
        self._known: dict[tuple[int, int], int] = {}  # process id and start -> ticks
        self._ticks = 0

    def seconds(self) -> float:
        """Look again. The time that a process took after the last look and before its end is not counted."""
        found = list(processes(self._proc))
        children: dict[int, list[Process]] = {}
        for each in found:
            children.setdefault(each.parent, []).append(each)
        family = [each for each in found if each.pid == self._pid]
        for each in family:  # grows meanwhile
            family.extend(children.get(each.pid, ()))
        now = {(each.pid, each.started): each.cpu_ticks for each in family}
        self._ticks += sum(ticks - self._known.get(key, 0) for key, ticks in now.items())
        self._known = now
        return self._ticks / TICKS_A_SECOND


class Resources(Collector):
    """Tell CPU time, and in a container with a limit its memory, each time Prometheus asks."""

    def __init__(self, proc: Path = Path("/proc"), control_group: Path = Path("/sys/fs/cgroup")) -> None:
        self._cpu = CpuTime(os.getpid(), proc)
        self._control_group = control_group

    def collect(self) -> Iterator[Metric]:
        cpu = CounterMetricFamily(
            "glimpse_cpu_seconds",
            "CPU seconds of the gateway and the processes that it started: decoders and the embedded Triton.",
        )
        cpu.add_metric([], self._cpu.seconds())
        yield cpu
        if (memory := memory_of_container(self._control_group)) is not None:
            yield GaugeMetricFamily(
                "glimpse_memory_bytes",
                "Memory that the container uses, without page cache that can be dropped. Only if it has a limit.",
                memory.used_bytes,
            )
            yield GaugeMetricFamily(
                "glimpse_memory_limit_bytes", "The container's memory limit. Only if it has one.", memory.limit_bytes
            )
