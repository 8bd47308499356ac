"""The addresses behind names, whatever the resolver does."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest

from service.upstreams import resolve
from service.upstreams.resolve import Names, looked_up


class Resolver:
    """Knows these names; `slow` ones have an answer only when `released` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **there: list[str]) -> None:
        self.there = there
        self.slow: set[str] = set()
        self.released = asyncio.Event()
        self.asked: Counter[str] = Counter()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.getaddrinfo)

    async def getaddrinfo(self, host: str, port: int, **_: object) -> list[object]:
        self.asked[host] += 1
        if host in self.slow:
            await self.released.wait()
        if host not in self.there:
            raise OSError("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.there[host]]


@pytest.mark.parametrize("name", ["a..b:1", ".a:1", f"{'a' * 64}.b:1", "unix:/run/llm", "unix:llm:1"])
async def test_a_name_that_no_resolver_takes_stands_for_itself(name: str) -> None:
    assert await Names().look([name]) == {name: [name]}


ONE, TWO, SIX = (
    (socket.AF_INET, ("10.0.0.1", 8001)),
    (socket.AF_INET, ("10.0.0.2", 8001)),
    (socket.AF_INET6, ("::1", 8001, 0, 0)),
)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([ONE], ["10.0.0.1:8001"]),
        ([SIX], ["[::1]:8001"]),
        ([ONE, TWO, ONE], ["10.0.0.1:8001", "10.0.0.2:8001"]),
        ([ONE, SIX], ["[fe80::2]:8001"]),  # one Triton with two addresses
        ([ONE, TWO, SIX], ["10.0.0.1:8001", "10.0.0.2:8001"]),
        ([SIX, ONE, TWO], ["[fe80::2]:8001"]),
    ],
)
async def test_the_addresses_of_the_first_family_are_the_tritons(monkeypatch, told, found) -> None:
    asked: list[object] = []

    async def getaddrinfo(host: str, port: int, *, type: int) -> list[object]:
        asked.append((host, port, type))
        return [(family, type, 6, "", address) for family, address in told]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await looked_up("[fe80::2]:8001") == found
    assert asked == [("fe80::2", 8001, socket.SOCK_STREAM)]


async def test_a_lookup_that_hangs_holds_up_no_other_and_counts_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "LOOKUP_S", 0.01)
    resolver = Resolver(monkeypatch, a=["10.0.0.1"], b=["10.0.0.2"])
    resolver.slow = {"a"}
    names, both = Names(), ["a:1", "b:1"]
    assert await names.look(both) == {"a:1": ["a:1"], "b:1": ["10.0.0.2:1"]}
    resolver.there["b"] = ["10.0.0.3"]
    assert await names.look(both) == {"a:1": ["a:1"], "b:1": ["10.0.0.3:1"]}
    assert resolver.asked == {"a": 1, "b": 2}  # no lookup begins beside one that goes on
    resolver.released.set()
    assert await names.look(both) == {"a:1": ["10.0.0.1:1"], "b:1": ["10.0.0.3:1"]}


async def test_a_lookup_that_hangs_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "LOOKUP_S", 0.01)
    Resolver(monkeypatch).slow = {"a"}
    names = Names()
    await names.look(["a:1"])
    (lookup,) = names._under_way.values()
    names.close()
    await asyncio.gather(lookup, return_exceptions=True)
    assert lookup.cancelled()
