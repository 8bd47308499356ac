"""Keep the keys in a file of JSON, which several commands and gateways may use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.access.keys import Keyring, KeysError
from service.system.files import locked, replace_file, when_unlocked

Seen = tuple[int, int, int]


class KeyFile:
    """Read the file, and read it again when its inode, size or time of change is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: Seen | None = None

    def read(self) -> Keyring:
        """Raises KeysError."""
        try:
            with self.path.open("rb") as file:
                told = os.fstat(file.fileno())
                text = file.read()
        except OSError as exc:
            raise KeysError(
                f"{self.path} cannot be read ({exc.strerror}): make it with `glimpse keys create`, or set GLIMPSE_KEYS "
                "to another file"
            ) from exc
        try:
            keyring = Keyring.from_json(text)
        except KeysError as exc:
            raise KeysError(f"{self.path}: {exc}") from exc
        self._seen = (told.st_ino, told.st_size, told.st_mtime_ns)
        return keyring

    async def changed(self) -> Keyring | None:
        """Return the keys if the file is another than was last read, else None. Raises KeysError."""
        return await asyncio.to_thread(self._changed)

    async def run(self) -> None:
        """Nothing has to run."""

    def _changed(self) -> Keyring | None:
        with suppress(OSError):  # else `read` says what is wrong
            told = self.path.stat()
            if (told.st_ino, told.st_size, told.st_mtime_ns) == self._seen:
                return None
        return self.read()

    async def loaded(self) -> Keyring:
        """Read the keys, for a command; there are none without a file. Raises KeysError."""
        return self.read() if self.path.exists() else Keyring()

    async def change(self, how: Callable[[Keyring], Keyring]) -> None:
        """Replace the file, which need not exist yet, in one step. Only its owner may read it. Raises KeysError."""
        try:
            await when_unlocked(lambda: self._change(how))
        except BlockingIOError as exc:
            raise KeysError(f"{self.path} is locked by another command: try again") from exc
        except OSError as exc:
            raise KeysError(f"{self.path} cannot be written ({exc.strerror})") from exc

    def _change(self, how: Callable[[Keyring], Keyring]) -> None:
        """Raises BlockingIOError if others hold the lock, KeysError, OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            changed = how(self.read() if self.path.exists() else Keyring())
            replace_file(self.path, changed.to_json())
