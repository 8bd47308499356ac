"""Give the campaign process, mount and shared-memory namespaces of its own.

All of its processes end with it, however it ends. A full disk is a full tmpfs of a few megabytes, and no other program
sees it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSIDE = "FAULTS_ISOLATED"  # variable of the environment: this process is in its own namespaces
NAMESPACES = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
AS_USER = ["--user", "--map-root-user"]


def command() -> list[str] | None:
    """Return what runs a program in its own namespaces, or None if this machine does not allow it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    for options in ([*NAMESPACES], [*AS_USER, *NAMESPACES]):
        tried = subprocess.run(
            [unshare, *options, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return [unshare, *options]
    return None


def enter(module: str, arguments: Sequence[str]) -> None:
    """Start this program again inside, in this process's place. Return if it is inside, or cannot be."""
    if INSIDE in os.environ or (inside := command()) is None:
        return
    os.environ[INSIDE] = "1"
    os.execv(inside[0], [*inside, sys.executable, "-m", module, *arguments])


def is_inside() -> bool:
    return INSIDE in os.environ


def mount_small(folder: Path, size_bytes: int) -> None:
    """Mount a tmpfs. It is gone when the campaign's last process has ended. Raises CalledProcessError."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)


def with_shared_memory(folder: Path, argv: Sequence[str]) -> list[str]:
    """Return a command that runs `argv` with this folder as its /dev/shm."""
    return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/shm && exec "$@"', str(folder), *argv]


def fill(folder: Path, name: str = "filler") -> Path:
    """Fill a tmpfs to its last byte -> the file that fills it."""
    filler = folder / name
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler
