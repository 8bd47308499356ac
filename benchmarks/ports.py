"""Choose ports that stay free until a server listens on them, and again while it is started anew."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator


def own_ports() -> Iterator[int]:
    """Yield every port of this process's share, round and round from a place that depends on the process.

    They are below 32768, where Linux begins to give ports to outgoing connections. So nobody takes a port between its
    choice and the start of its server. pytest-xdist's workers have shares of their own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = 20_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first, begin = 12_000 + worker * size, os.getpid() * 41
    return (first + place % size for place in itertools.count(begin))


PORTS = own_ports()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, each given once."""
    return list(itertools.islice(filter(is_free, PORTS), count))


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
