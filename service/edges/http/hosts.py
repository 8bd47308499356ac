"""Which names of this service a request may use in its Host header.

A web page can let its own name point to 127.0.0.1 (DNS rebinding). A browser on this machine then sends the page's
requests to the gateway and lets the page read the answers. The Host header still has the page's name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

OWN_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def allowed_hosts(http_host: str, named: Iterable[str]) -> frozenset[str] | None:
    """None if any name will do."""
    more = frozenset(map(_normal, named))
    if not more and not _is_loopback(http_host):
        return None
    return OWN_NAMES | more | {f"[{http_host}]" if ":" in http_host else _normal(http_host)}


def name_in(host: str) -> str:
    """A Host header's name without its port."""
    if host.startswith("["):
        name, bracket, port = host.partition("]")
        return _normal(name + bracket if port[:1] in ("", ":") else host)
    return _normal(host.partition(":")[0])


def _normal(name: str) -> str:
    return name.strip().lower().removesuffix(".")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return _normal(host) == "localhost"
