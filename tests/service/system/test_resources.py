"""CPU time of a family of processes, and a container's memory, from files as the kernel writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.system.resources import TICKS_A_SECOND, CpuTime, Memory, Resources, memory_of_container


def write(root: Path, **files: object) -> Path:
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(f"{text}\n")
    return root


def process(proc: Path, pid: int, parent: int, ticks: int, started: int = 1) -> None:
    """`user` and `system` are fields 14 and 15 of stat, `started` is field 22."""
    (proc / str(pid)).mkdir(exist_ok=True)
    fields = ["S", parent, *[0] * 9, ticks - ticks // 3, ticks // 3, *[0] * 6, started]
    (proc / str(pid) / "stat").write_text(f"{pid} (a) b (c)) {' '.join(map(str, fields))}\n")


def end(proc: Path, pid: int) -> None:
    (proc / str(pid) / "stat").unlink()


def test_memory_leaves_out_page_cache_that_can_be_dropped(tmp_path):
    write(tmp_path, memory__current=900, memory__max=1000, memory__stat="anon 500\ninactive_file 300")
    assert memory_of_container(tmp_path) == Memory(600, 1000)


def test_memory_of_the_old_control_groups(tmp_path):
    folder = tmp_path / "memory"
    folder.mkdir()
    write(folder, memory__usage_in_bytes=900, memory__limit_in_bytes=1000, memory__stat="total_inactive_file 100")
    assert memory_of_container(tmp_path) == Memory(800, 1000)


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_without_a_limit_there_is_no_memory_to_tell(tmp_path, limit):
    write(tmp_path, memory__current=900, memory__max=limit, memory__stat="inactive_file 300")
    assert memory_of_container(tmp_path) is None
    assert memory_of_container(tmp_path / "missing") is None


def test_cpu_time_is_that_of_the_family_and_never_falls(tmp_path):
    process(tmp_path, 1, 0, 1000)
    process(tmp_path, 10, 1, 100)
    process(tmp_path, 11, 10, 50)
    process(tmp_path, 12, 11, 30)
    process(tmp_path, 20, 1, 7777)
    (tmp_path / "uptime").write_text("1 1\n")
    cpu = CpuTime(10, tmp_path)
    assert cpu.seconds() == 180 / TICKS_A_SECOND
    process(tmp_path, 11, 10, 60)
    end(tmp_path, 12)
    assert cpu.seconds() == 190 / TICKS_A_SECOND
    process(tmp_path, 12, 10, 5, started=9)  # another one with the same id
    assert cpu.seconds() == 195 / TICKS_A_SECOND


def test_cpu_time_counts_a_real_child():
    cpu = CpuTime(os.getpid(), Path("/proc"))
    before = cpu.seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert cpu.seconds() - before >= 0.25
        child.communicate(b"\n")


def test_memory_is_told_only_with_a_limit(tmp_path):
    names = {metric.name for metric in Resources(control_group=tmp_path).collect()}
    assert names == {"glimpse_cpu_seconds"}
    write(tmp_path, memory__current=900, memory__max=1000, memory__stat="inactive_file 300")
    told = {metric.name: metric.samples[0].value for metric in Resources(control_group=tmp_path).collect()}
    assert (told["glimpse_memory_bytes"], told["glimpse_memory_limit_bytes"]) == (600, 1000)
