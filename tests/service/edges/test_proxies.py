"""Whose address a caller has: its own, or what a listed proxy tells of it."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from service.edges.proxies import MAX_HOPS, NO_PROXIES, Proxies

PROXIES = Proxies((ip_network("10.1.0.0/16"), ip_network("fd12:3456::/32")))
PROXY = "10.1.0.9"

CHAINS = {
    "no proxy": ("198.51.100.7", [], "198.51.100.7"),
    "a spoofed header of a caller without a proxy": ("198.51.100.7", ["203.0.113.1"], "198.51.100.7"),
    "a neighbour of the network": ("10.2.0.1", ["203.0.113.1"], "10.2.0.1"),
    "one proxy": (PROXY, ["203.0.113.1"], "203.0.113.1"),
    "a proxy that tells nothing": (PROXY, [], PROXY),
    "a spoofed address before the true one": (PROXY, ["6.6.6.6, 203.0.113.1"], "203.0.113.1"),
    "a spoofed proxy before the true address": (PROXY, ["6.6.6.6, 10.1.0.1, 203.0.113.1"], "203.0.113.1"),
    "a spoofed header of its own": (PROXY, ["6.6.6.6", "203.0.113.1"], "203.0.113.1"),
    "several proxies": (PROXY, ["6.6.6.6, 203.0.113.1, 10.1.0.1, 10.1.2.3"], "203.0.113.1"),
    "several proxies in several headers": (PROXY, ["203.0.113.1", "10.1.0.1,10.1.2.3"], "203.0.113.1"),
    "only proxies": (PROXY, ["10.1.0.1, 10.1.2.3"], "10.1.0.1"),
    "no address": (PROXY, ["unknown"], PROXY),
    "no address behind a proxy": (PROXY, ["203.0.113.1, unknown, 10.1.0.1"], "10.1.0.1"),
    "an empty word": (PROXY, ["203.0.113.1, "], PROXY),
    "an obfuscated name": (PROXY, ["_hidden"], PROXY),
    "text that would break a log line": (PROXY, ['203.0.113.1\r\nlevel=error event="x"'], PROXY),
    "a number": (PROXY, ["3405803777"], PROXY),
    "octal": (PROXY, ["0313.0.0161.01"], PROXY),
    "a port": (PROXY, ["203.0.113.1:4711"], "203.0.113.1"),
    "IPv6": (PROXY, ["2001:db8::7"], "2001:db8::7"),
    "IPv6 with a port": (PROXY, ["[2001:db8::7]:4711"], "2001:db8::7"),
    "IPv6 in another spelling": (PROXY, ["2001:0DB8:0:0::0007"], "2001:db8::7"),
    "a zone": (PROXY, ["fe80::1%eth0"], "fe80::1"),
    "IPv4 in IPv6": (PROXY, ["::ffff:203.0.113.1"], "203.0.113.1"),
    "a proxy of IPv6": ("fd12:3456::9", ["203.0.113.1"], "203.0.113.1"),
    "a proxy that is IPv4 in IPv6": ("::ffff:10.1.0.9", ["203.0.113.1"], "203.0.113.1"),
    "a proxy in the chain that is IPv4 in IPv6": (PROXY, ["203.0.113.1, ::ffff:10.1.0.1"], "203.0.113.1"),
    "an unknown kind of peer": ("", ["203.0.113.1"], ""),
    "a chain without an end": (PROXY, ["203.0.113.1" + ",10.1.0.1" * MAX_HOPS], "10.1.0.1"),
}


@pytest.mark.parametrize(("peer", "forwarded", "client"), CHAINS.values(), ids=CHAINS)
def test_the_last_address_that_is_no_proxys_is_the_callers(peer, forwarded, client):
    assert PROXIES.client(peer, forwarded) == client


def test_without_proxies_nothing_is_believed():
    assert NO_PROXIES.client("127.0.0.1", ["203.0.113.1"]) == "127.0.0.1"
    assert "127.0.0.1" not in NO_PROXIES
