"""The folder of one Triton, and what a killed gateway leaves: its folder, its shared memory, its dying Triton.

A gateway holds a lock on its folder while it lives. The kernel lets go of it however the gateway ends, so a folder
without a lock has no owner. Locks work across containers that share a folder; process ids do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from service.triton_server.access import FOLDER
from service.triton_server.installation import StartFailed
from service.triton_server.processes import GONE, Proc, free_regions

GONE_WITHIN_S = 10.0

log = structlog.get_logger()


def claim(folder: Path) -> int:
    """Make the folder, mode 0700, and lock it while this process lives -> the descriptor that holds the lock.

    Raises StartFailed.
    """
    new = folder.with_name(f"new-{folder.name}")  # nobody takes it for a leftover before it is locked
    try:
        new.mkdir(mode=0o700)
        descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(folder)
    except OSError as exc:
        raise StartFailed(
            f"no temporary folder can be made in {folder.parent} ({exc.strerror}): make room there, or set TMPDIR"
        ) from exc
    return descriptor


async def clean_up(parents: Iterable[Path], proc: Proc) -> None:
    """Remove what dead gateways of this user left in these folders, and end their Tritons. Raises nothing."""
    for parent in parents:
        with contextlib.suppress(OSError):
            for folder in sorted(parent.iterdir()):
                if FOLDER.fullmatch(folder.name):
                    with contextlib.suppress(OSError):
                        await _clean_up(folder, proc)


async def _clean_up(folder: Path, proc: Proc) -> None:
    """Raises OSError if the folder has an owner, is not this user's, or cannot be removed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        told = os.fstat(descriptor)
        if told.st_uid != os.geteuid() or stat.S_IMODE(told.st_mode) & 0o022:
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ended = await _end(f"{folder.name}-", proc)
        free_regions(f"{folder.name}-")
        shutil.rmtree(folder)
        log.warning("leftovers_removed", folder=str(folder), processes=ended)
    finally:
        os.close(descriptor)


async def _end(region_prefix: str, proc: Proc) -> int:
    """Kill the processes that name these regions in their arguments, and wait until they are gone -> how many."""
    left = found = [pid for pid in proc.pids() if _names(proc, pid, region_prefix)]
    deadline = time.monotonic() + GONE_WITHIN_S
    while left and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
        left = [pid for pid in left if not proc.is_gone(pid)]
    return len(found)


def _names(proc: Proc, pid: int, region_prefix: str) -> bool:
    try:
        return region_prefix in proc.read(pid, "cmdline")
    except GONE:
        return False
