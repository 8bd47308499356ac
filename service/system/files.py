"""Write files that others read meanwhile."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of whoever replaces this file, for the block. Whoever may write the folder may lock too.

    The lock is a file of its own beside it. Raises BlockingIOError if others hold it and `wait` is false, and OSError.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # NFS locks only what may be written
    except PermissionError:
        lock = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        folder = path.parent.stat()
        with suppress(PermissionError):  # the lock file belongs to another user, whose command did this
            os.fchmod(lock, folder.st_mode & 0o666 | 0o444)
            os.fchown(lock, -1, folder.st_gid)
            os.fchown(lock, folder.st_uid, -1)
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
