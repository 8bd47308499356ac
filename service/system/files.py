"""Write files that others read meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LOCK_S = 5.0  # how long a change of a file waits for another one
LOOK_S = 0.01  # at the lock


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 beside this one, and put it in its place. Raises OSError."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():  # a service that runs as another user must still read it
            told = path.stat()
            os.chmod(name, told.st_mode & 0o777)
            with suppress(PermissionError):
                os.chown(name, told.st_uid, told.st_gid)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


async def when_unlocked(change: Callable[[], T]) -> T:
    """Call what holds the lock for its change, again while others hold it -> its result.

    Raises BlockingIOError if they hold it for LOCK_S, and what `change` raises.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            # One thread does all of it: if the caller is cancelled, the lock is held until the file is whole.
            return await asyncio.to_thread(change)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(LOOK_S)  # no thread waits: others, which follow the file, need them


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of whoever replaces this file, for the block. Whoever may write the folder may lock, and no other.

    The lock is a file of its own beside it. Raises BlockingIOError if others hold it, and OSError.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # NFS locks only what may be written
    except PermissionError:  # of another user, made by an earlier release
        lock = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        folder = path.parent.stat()
        with suppress(PermissionError):  # the lock file belongs to another user, whose command did this
            os.fchmod(lock, lock_mode(folder.st_mode))
            os.fchown(lock, -1, folder.st_gid)
            os.fchown(lock, folder.st_uid, -1)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def lock_mode(folder_mode: int) -> int:
    """Return the mode that lets those lock who may write the folder. Whoever may read a lock file can hold its lock."""
    writers = folder_mode & 0o222
    return 0o600 | writers | writers << 1
