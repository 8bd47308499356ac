"""Find the addresses behind a name: a name with several addresses is several Tritons."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence


async def resolved(names: Sequence[str], known: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return every address of each name, as HOST:PORT with a number for the host, or unix: and a path.

    If a name cannot be looked up now, its `known` addresses stay; without any, the name itself stands for them, and
    gRPC looks it up. So it does for a name with one address of each kind, such as localhost: gRPC finds out which of
    the two answers.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("unix:"):
            found[name] = [name]
            continue
        host, _, port = name.rpartition(":")
        try:
            told = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError:
            found[name] = list(known.get(name) or [name])
            continue
        families: dict[int, dict[str, None]] = {}
        for family, *_, address in told:
            ip = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
            families.setdefault(family, {})[f"{ip}:{port}"] = None
        first = next(iter(families.values()))  # a Triton with an IPv4 and an IPv6 address is one Triton
        found[name] = [name] if len(families) > 1 and len(first) == 1 else list(first)
    return found
