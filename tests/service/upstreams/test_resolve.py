"""The addresses behind names, whatever the resolver does."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest

from service.upstreams import resolve
from service.upstreams.resolve import Names


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


@pytest.mark.parametrize("name", ["a..b:1", ".a:1", f"{'a' * 64}.b:1"])
async def test_a_name_that_no_resolver_takes_stands_for_itself(name: str) -> None:
    assert await Names().look([name]) == {name: [name]}


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
