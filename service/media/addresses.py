"""Which addresses a fetched URL may lead to. Pure: names are resolved elsewhere.

Sources: IANA's registries of special-purpose IPv4 and IPv6 addresses (RFC 6890 and its updates), and the clouds' own
pages on their metadata services.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

# No setting allows these: they name this host or its link, stand for another address, or are a cloud's metadata
# service, which hands out credentials.
NEVER: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",  # this host
            "100.100.100.200/32",  # metadata: Alibaba
            "168.63.129.16/32",  # metadata: Azure; a public address
            "169.254.0.0/16",  # link-local; metadata: AWS, Azure, Google, Oracle and others
            "192.0.0.0/24",  # protocol assignments; metadata: Oracle
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
            "::/96",  # unspecified, IPv4-compatible; ::1 is in PRIVATE
            "::ffff:0:0/96",  # IPv4-mapped
            "::ffff:0:0:0/96",  # IPv4-translated
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",  # NAT64, local use
            "100::/64",  # discard
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
            "fd00:42::42/128",  # metadata: Scaleway
            "fd00:100::100:200/128",  # metadata: Alibaba
            "fd00:a9fe:a9fe::1/128",  # metadata: Akamai
            "fd00:c1::a9fe:a9fe/128",  # metadata: Oracle
            "fd00:ec2::/32",  # metadata: AWS
            "fd20:ce::/32",  # metadata: Google
            "fe80::/10",  # link-local
            "fec0::/10",  # site-local
            "ff00::/8",  # multicast
        ),
    )
)
# Only if the operator lists a network that holds them.
PRIVATE: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT
            "127.0.0.0/8",
            "172.16.0.0/12",
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "2001::/23",  # protocol assignments
            "2001:db8::/32",  # documentation
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
LOOPBACK = IPv6Address("::1")
GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA gives out; the rest of IPv6 is private


def is_allowed(address: str, private_networks: Iterable[Network] = ()) -> bool:
    """Whether a connection to this address, as a resolver wrote it, may be opened.

    It may if the address is public, or if it lies in one of `private_networks` and is not in NEVER. An address with a
    scope (`fe80::1%eth0`) never may, nor what is no address.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.scope_id is not None:
        return False
    if found != LOOPBACK and _in(found, NEVER):
        return False
    return _in(found, private_networks) or _is_public(found)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    return address.is_global and not _in(address, PRIVATE)  # Python's table may know newer networks


def _in(address: IPv4Address | IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)
