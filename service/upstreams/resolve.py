"""Find the addresses behind a name: a name with several addresses is several Tritons."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection

LOOKUP_S = 2.0  # that one look waits for names


class Names:
    """Look names up again and again, and remember what each had when it was last found."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._under_way: dict[str, asyncio.Task[list[str]]] = {}

    async def look(self, names: Collection[str]) -> dict[str, list[str]]:
        """Return every address of each name, as HOST:PORT with a number for the host, or unix: and a path.

        If a name cannot be looked up now, its last addresses stay; without any, the name itself stands for them, and
        gRPC looks it up. A lookup that takes longer than LOOKUP_S counts at a later look. `names` are not empty.
        """
        for name in names:
            if name not in self._under_way:
                self._under_way[name] = asyncio.create_task(looked_up(name))
        await asyncio.wait(self._under_way.values(), timeout=LOOKUP_S)
        for name, task in list(self._under_way.items()):
            if task.done():
                del self._under_way[name]
                self._found[name] = task.result() or self._found.get(name, [])
        return {name: self._found.get(name) or [name] for name in names}

    def close(self) -> None:
        """End the lookups under way."""
        for task in self._under_way.values():
            task.cancel()
        self._under_way.clear()


async def looked_up(name: str) -> list[str]:
    """Return every address of a name; none if it cannot be looked up.

    A name with one address of each kind, such as localhost, stands for itself: gRPC finds out which of them answers.
    """
    if name.startswith("unix:"):
        return [name]
    host, _, port = name.rpartition(":")
    try:
        told = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a label is empty or longer than 63 characters
        return []
    families: dict[int, dict[str, None]] = {}
    for family, *_, address in told:
        ip = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        families.setdefault(family, {})[f"{ip}:{port}"] = None
    first = next(iter(families.values()))  # a Triton with an IPv4 and an IPv6 address is one Triton
    return [name] if len(families) > 1 and len(first) == 1 else list(first)
