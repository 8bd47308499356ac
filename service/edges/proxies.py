"""Find the address of a caller that a proxy stands in front of.

Only the X-Forwarded-For of a listed proxy counts. A proxy appends the address that it sees. The caller may have written
the addresses before that one itself. `Forwarded` is not read, because many proxies pass on what the caller wrote there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

FORWARDED_KEY = "x-forwarded-for"  # a header of HTTP, and metadata of gRPC
MAX_HOPS = 16  # listed proxies in a row

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxies:
    """The networks of the proxies whose word about their callers is believed."""

    networks: Sequence[Network] = ()

    def __contains__(self, address: str) -> bool:
        """Whether a proxy has this address."""
        return bool(self.networks) and self._holds(address_in(address))

    def client(self, peer: str, forwarded: Iterable[str]) -> str:
        """Return the caller's address: the last one of the chain that is no listed proxy's.

        `peer` is the address of the connection, `forwarded` are the X-Forwarded-For headers in their order. If a proxy
        tells something that is no address, the proxy's own address stands for the caller.
        """
        if peer not in self:
            return peer
        hops = [hop for header in forwarded for hop in header.split(",")]
        client = peer
        for hop in islice(reversed(hops), MAX_HOPS):
            found = address_in(hop)
            if found is None:
                break
            client = str(found)
            if not self._holds(found):
                break
        return client

    def _holds(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self.networks)


NO_PROXIES = Proxies()


def address_in(text: str) -> Address | None:
    """Read an address, perhaps with a port, brackets or a zone; IPv4 inside IPv6 is IPv4. None if there is none."""
    bare = text.strip()
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = bare.partition(":")[0]
    try:
        found = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found
