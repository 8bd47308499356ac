"""Bound the freed memory that glibc's heap keeps.

glibc gives a large block a mapping of its own, and unmaps it when it is freed. But it then raises the size from which
it does so, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Later blocks of that size come from the heap. Small ones settle
between them, so that a process keeps about the most that it ever needed. A fixed size prevents that. It costs fresh
pages for each block, so it must be larger than what each request needs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Heap:
    """Three numbers of mallopt(3)."""

    mapped_from_bytes: int  # a block of this size is mapped; glibc takes 32 MiB at most
    kept_bytes: int  # free memory at the heap's end, from which it goes back to the system
    arenas: int  # heaps that threads share

    def settings(self) -> Mapping[str, tuple[int, int]]:
        """By the environment variable: mallopt's number of the parameter, and its value."""
        return {
            "MALLOC_MMAP_THRESHOLD_": (-3, self.mapped_from_bytes),
            "MALLOC_TRIM_THRESHOLD_": (-1, self.kept_bytes),
            "MALLOC_ARENA_MAX": (-8, self.arenas),
        }

    def environment(self) -> dict[str, str]:
        """The environment of a process that is to have this heap, except for what this process's own says."""
        return {name: os.environ.get(name, str(value)) for name, (_, value) in self.settings().items()}

    def take(self) -> None:
        """Use it in this process from now on, except for what its environment says. Without glibc, do nothing."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for name, (parameter, value) in self.settings().items():
                if name not in os.environ:
                    libc.mallopt(parameter, value)


# The features of a closer view are a message of up to 7.2 MB (ViT-g). Only large images are more.
GATEWAY = Heap(mapped_from_bytes=8 * MIB, kept_bytes=32 * MIB, arenas=2)
# Keys and values of the running requests are larger, and are moved as requests come and go.
TRITON = Heap(mapped_from_bytes=4 * MIB, kept_bytes=16 * MIB, arenas=2)


def give_back() -> None:
    """Give all free memory back to the system, also from between used blocks. Without glibc, do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
