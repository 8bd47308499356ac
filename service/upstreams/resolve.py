"""Find the addresses behind a name: a name with several addresses is several Tritons."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence


async def resolved(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return every address of the names, as HOST:PORT with a number for the host, or unix: and a path.

    If a name cannot be looked up now, the `known` addresses of its port stay; without any, the name itself stands for
    them, and gRPC looks it up.
    """
    found: dict[str, None] = {}
    for name in names:
        if name.startswith("unix:"):
            found[name] = None
            continue
        host, _, port = name.rpartition(":")
        try:
            told = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError:
            kept = [address for address in known if address.rpartition(":")[2] == port]
            found.update(dict.fromkeys(kept or [name]))
            continue
        best = told[0][0]  # one family only: a Triton with an IPv4 and an IPv6 address is one Triton
        for address in (address for family, *_, address in told if family == best):
            ip = f"[{address[0]}]" if best == socket.AF_INET6 else address[0]
            found[f"{ip}:{port}"] = None
    return list(found)
