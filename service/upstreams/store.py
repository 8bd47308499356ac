"""Keep the variants in a file of JSON, or in Redis for several gateways, and notice when they change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from service.cache.admin import opened
from service.cache.redis_client import Lane, RedisFault, granted
from service.system.files import locked, replace_file, when_unlocked
from service.upstreams.variants import Variants, VariantsError

IN_REDIS = "redis"  # as GLIMPSE_VARIANTS: the variants are in GLIMPSE_REDIS_URL
KEY = "glimpse:{variants}"  # a string: the same JSON as in a file. It has no expiry
# Another command may change the variants between this one's look and its write.
REPLACE = (
    "if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end redis.call('SET', KEYS[1], ARGV[2]) return 1"
)
ATTEMPTS = 20
TIMEOUT_S = 1.0  # for one look

Seen = tuple[int, int, int]  # of a file: inode, size, time of its last change


class Store(Protocol):
    async def loaded(self) -> Variants:
        """Read the variants; none if there is no file or no entry yet. Raises VariantsError."""
        ...

    async def run(self) -> None:
        """Own what `changed` needs, until cancelled."""
        ...

    async def changed(self) -> Variants | None:
        """Return the variants if they are others than were last read, else None. Raises VariantsError."""
        ...

    async def change(self, how: Callable[[Variants], Variants]) -> Variants:
        """Write what `how` makes of the variants, and nothing if another change came between -> what was written.

        `how` may be called again, with what the other change wrote. Raises VariantsError, and what `how` raises.
        """
        ...


class FixedVariants:
    """Hold what the settings say: it never changes."""

    def __init__(self, variants: Variants) -> None:
        self.variants = variants

    async def loaded(self) -> Variants:
        return self.variants

    async def run(self) -> None:
        """Nothing has to run."""

    async def changed(self) -> Variants | None:
        return None

    async def change(self, how: Callable[[Variants], Variants]) -> Variants:  # noqa: ARG002
        raise VariantsError("the settings say which Tritons there are: change GLIMPSE_VISION_URL and GLIMPSE_LLM_URL")


class VariantsFile:
    """Read the file, and read it again when its inode, size or time of change is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: Seen | None = None

    async def loaded(self) -> Variants:
        return await asyncio.to_thread(self._loaded)

    async def run(self) -> None:
        """Nothing has to run."""

    async def changed(self) -> Variants | None:
        return await asyncio.to_thread(self._changed)

    def _loaded(self) -> Variants:
        return self._read() if self.path.exists() else Variants()

    def _changed(self) -> Variants | None:
        with suppress(OSError):  # else `_read` says what is wrong
            told = self.path.stat()
            if (told.st_ino, told.st_size, told.st_mtime_ns) == self._seen:
                return None
        return self._read()

    def _read(self) -> Variants:
        self._seen, variants = self._look()
        return variants

    def _look(self) -> tuple[Seen, Variants]:
        try:
            told, text = self.path.stat(), self.path.read_bytes()
        except OSError as exc:
            raise VariantsError(
                f"{self.path} cannot be read ({exc.strerror}): make it with `glimpse variants add`, or set "
                "GLIMPSE_VARIANTS to another file"
            ) from exc
        try:
            return (told.st_ino, told.st_size, told.st_mtime_ns), Variants.from_json(text)
        except VariantsError as exc:
            raise VariantsError(f"{self.path}: {exc}") from exc

    async def change(self, how: Callable[[Variants], Variants]) -> Variants:
        try:
            return await when_unlocked(lambda: self._change(how))
        except BlockingIOError as exc:
            raise VariantsError(f"{self.path} is locked by another command: try again") from exc

    def _change(self, how: Callable[[Variants], Variants]) -> Variants:
        """Raises BlockingIOError if others hold the lock, VariantsError, and what `how` raises."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                changed = how(self._look()[1] if self.path.exists() else Variants())
                replace_file(self.path, changed.to_json())
        except BlockingIOError:
            raise
        except OSError as exc:
            raise VariantsError(f"{self.path} cannot be written ({exc.strerror})") from exc
        return changed


class VariantsInRedis:
    """`changed` is usable while `run` runs."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that cannot be used."""
        self.lane = Lane(url, TIMEOUT_S)
        self._url = url
        self._seen: bytes | None = None

    async def run(self) -> None:
        """Own the connection until cancelled."""
        await self.lane.run()

    async def loaded(self) -> Variants:
        async with redis_asked(self._url) as lane:
            text = await read(lane)
        variants, self._seen = parsed(text), text
        return variants

    async def changed(self) -> Variants | None:
        with told():
            text = await read(self.lane)
        if text == self._seen:
            return None
        if not text:
            raise VariantsError("the variants are no longer in Redis: the gateway goes on with the last ones")
        variants, self._seen = parsed(text), text
        return variants

    async def change(self, how: Callable[[Variants], Variants]) -> Variants:
        async with redis_asked(self._url) as lane:
            for _ in range(ATTEMPTS):
                before = await read(lane)
                changed = how(parsed(before))
                (done,) = map(granted, await lane.ask(("EVAL", REPLACE, 1, KEY, before, changed.to_json())))
                if done:
                    return changed
        raise VariantsError("others change the variants at the same time: try again")


def parsed(text: bytes) -> Variants:
    """Raises VariantsError."""
    if not text:
        return Variants()
    try:
        return Variants.from_json(text)
    except VariantsError as exc:
        raise VariantsError(f"the variants in Redis: {exc}") from exc


async def read(lane: Lane) -> bytes:
    (text,) = map(granted, await lane.ask(("GET", KEY)))
    return text or b""


@contextmanager
def told() -> Iterator[None]:
    """Translate Redis's errors."""
    try:
        yield
    except RedisFault as fault:
        raise VariantsError(f"the variants in Redis cannot be read or written ({fault.message})") from fault


@asynccontextmanager
async def redis_asked(url: str) -> AsyncIterator[Lane]:
    """Open a connection for one command. Raises VariantsError."""
    with told():
        async with opened(url) as lane:
            yield lane
