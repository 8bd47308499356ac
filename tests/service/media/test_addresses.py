from __future__ import annotations

from ipaddress import IPv4Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.media.addresses import is_allowed

EVERYTHING = (ip_network("0.0.0.0/0"), ip_network("::/0"))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_are_allowed(address):
    assert is_allowed(address)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "::1",
        "2001:db8::1",
        "3fff::1",
        "4000::1",
        "fc00::1",
        "fd12:3456::1",
    ],
)
def test_private_addresses_are_allowed_only_if_they_are_listed(address):
    assert not is_allowed(address)
    assert is_allowed(address, (ip_network(address),))
    assert not is_allowed(address, (ip_network("10.9.9.0/24"), ip_network("fd00:9::/64")))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.0.1",
        "192.0.0.192",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::127.0.0.1",
        "::8.8.8.8",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::ffff:0:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "fd00:42::42",
        "fd00:100::100:200",
        "fd00:a9fe:a9fe::1",
        "fd00:c1::a9fe:a9fe",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1111%2",
        "fec0::1",
        "ff02::1",
        "",
        "localhost",
        "127.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
    ],
)
def test_what_names_this_host_another_address_or_a_metadata_service_is_never_allowed(address):
    assert not is_allowed(address)
    assert not is_allowed(address, EVERYTHING)


@given(st.integers(2, 2**32 - 1), st.sampled_from(["::{}", "::ffff:{}", "64:ff9b::{}", "::ffff:0:{}"]))
def test_an_ipv4_address_inside_an_ipv6_address_is_never_allowed(number, form):
    """From 2 on: ::0.0.0.1 is ::1, which a setting may allow."""
    assert not is_allowed(form.format(IPv4Address(number)), EVERYTHING)
