"""What a process keeps of freed memory, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from service.system.heap import TRITON, Heap

# Blocks of 8 MB come and go while small ones stay, as keys and values of requests do. Without a fixed size the first
# that is freed lets all others come from the heap, and the small ones keep them there.
BLOCKS = """
import ctypes
from service.system.heap import TRITON

if {takes}:
    TRITON.take()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def block(size):
    found = libc.malloc(size)
    ctypes.memset(found, 1, size)
    return found

libc.free(block(8_000_000))
large = []
for _ in range(10):
    large.append(block(7_000_000))
    block(100_000)
for one in large:
    libc.free(one)
print(int(open("/proc/self/statm").read().split()[1]) * 4096 // 1_000_000)
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRITON.settings():
        monkeypatch.delenv(name, raising=False)


def resident_mb(takes: bool, **environment: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKS.format(takes=takes)],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return int(ran.stdout)


def test_large_blocks_go_back_to_the_system_when_they_are_freed():
    assert resident_mb(takes=True) < 40
    assert resident_mb(takes=False) > 70  # what glibc does of itself


def test_a_process_may_be_given_the_heap_by_its_environment():
    assert resident_mb(takes=False, **TRITON.environment()) < 40


def test_what_the_operator_sets_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "7")
    assert TRITON.environment()["MALLOC_ARENA_MAX"] == "7"


def test_what_the_operator_sets_is_left_by_a_process_too():
    assert resident_mb(takes=True, MALLOC_MMAP_THRESHOLD_="33554432", MALLOC_TRIM_THRESHOLD_="536870912") > 70


def test_an_environment_names_all_of_a_heap():
    assert Heap(mapped_from_bytes=1, kept_bytes=2, arenas=3).environment() == {
        "MALLOC_MMAP_THRESHOLD_": "1",
        "MALLOC_TRIM_THRESHOLD_": "2",
        "MALLOC_ARENA_MAX": "3",
    }
