"""How many connections may be open, in all and from one address, and which of them makes room for a new one.

A connection that has a request in work is never closed for a new one. If all connections are taken, the address that
holds the most gives one up, so a caller with few connections keeps them. If that address has none to spare, another's
is closed.

1. The oldest connection that has never sent a whole request goes first, then the one that has been idle longest.
2. One that has just sent something is passed over: its request is not read yet, and a client cannot tell whether it may
   send that again.
3. One address may replace a bounded number of connections a second. A caller that connects again whenever it is closed
   would otherwise keep the event loop busy. An address that holds less than half as many as the largest is exempt.

A proxy that is exempt has the callers of many addresses: each of its connections counts as an address of its own.

Pure: nothing here touches a socket, and time is an argument.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, TypeVar

Connection = TypeVar("Connection", bound=Hashable)
BURST_S = 10.0  # so many seconds' worth of replacements may come at once
KEPT_RATES = 4096  # addresses whose rate is remembered; the one that came longest ago is forgotten first
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # all of IPv4, behind a translator. Source: RFC 6052
MOST_LOOKED_AT = 16  # candidates, of which each may have sent something just now


@dataclass(slots=True)
class Group(Generic[Connection]):
    """Connections, all or those of one address. The dicts keep the order in which connections came to wait."""

    most: int
    open: set[Connection] = field(default_factory=set)
    new: dict[Connection, None] = field(default_factory=dict)  # no whole request yet
    idle: dict[Connection, None] = field(default_factory=dict)  # between two requests

    def spare(self, has_sent: Callable[[Connection], bool]) -> Connection | None:
        """The first to go that has not sent anything just now."""
        candidates = islice(chain(self.new, self.idle), MOST_LOOKED_AT)
        return next((connection for connection in candidates if not has_sent(connection)), None)

    def stop_waiting(self, connection: Connection) -> None:
        self.new.pop(connection, None)
        self.idle.pop(connection, None)


class Holders:
    """Addresses, by how many connections they hold."""

    def __init__(self) -> None:
        self.most = 0  # that any of them holds
        self._addresses: dict[int, dict[str, None]] = {}  # by number of connections

    @property
    def largest(self) -> str | None:
        """One of the addresses that hold the most."""
        return next(iter(self._addresses[self.most])) if self.most else None

    def move(self, address: str, before: int, after: int) -> None:
        """The address held `before` connections and holds `after`, which is one more or one less."""
        if before:
            same = self._addresses[before]
            del same[address]
            if not same:
                del self._addresses[before]
        if after:
            self._addresses.setdefault(after, {})[address] = None
        if after > self.most or self.most not in self._addresses:
            self.most = after


class Rates:
    """How many connections each address may still replace: a token bucket for each."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._most = max(1.0, per_s * BURST_S)
        self._left: dict[str, tuple[float, float]] = {}  # by network: tokens, and when there were so many

    def take(self, network: str, now: float) -> bool:
        """Whether it may replace one more at `now`, in seconds of any clock that does not go back."""
        left, since = self._left.pop(network, (self._most, now))
        left = min(self._most, left + (now - since) * self._per_s)
        taken = left >= 1
        self._left[network] = (left - taken, now)
        if len(self._left) > KEPT_RATES:
            del self._left[next(iter(self._left))]
        return taken


def network_of(address: str) -> str:
    """The address; of IPv6 its /64, which one customer has whole. A translator's addresses stand for IPv4 ones."""
    if ":" not in address:
        return address
    read = ipaddress.IPv6Address(address.partition("%")[0])
    if read in TRANSLATED:
        return str(ipaddress.IPv4Address(read.packed[12:]))
    return str(read.ipv4_mapped or read.packed[:8].hex())


class Connections(Generic[Connection]):
    """The open connections of one server."""

    def __init__(
        self,
        most: int,
        most_per_address: int,
        replaced_per_s: float,
        has_sent: Callable[[Connection], bool] = lambda _: False,
        is_exempt: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`has_sent` says whether bytes of a connection wait to be read: its request has come, and is not known yet.
        `is_exempt` says of an address whether the limits of one address do not apply to it."""
        self.most_per_address = most_per_address
        self._rates = Rates(replaced_per_s)
        self._has_sent = has_sent
        self._is_exempt = is_exempt
        self._all: Group[Connection] = Group(most)
        self._networks: dict[str, Group[Connection]] = {}
        self._network_of: dict[Connection, str] = {}
        self._holders = Holders()

    def __len__(self) -> int:
        return len(self._all.open)

    def admits(self, address: str, now: float, coming: int = 0) -> bool:
        """Whether a new connection may come in, before anything is made for it.

        It may if it takes no other's place, if its address holds few, or if that address's rate allows it. `coming`
        connections have been let in and have not entered yet.
        """
        if self._is_exempt(address):
            return True
        network = network_of(address)
        held = self._networks.get(network)
        own = len(held.open) if held else 0
        if own + coming < self.most_per_address:
            if len(self._all.open) + coming < self._all.most:
                return True
            if 2 * (own + 1) <= self._holders.most:
                return True
        return self._rates.take(network, now)

    def enter(self, connection: Connection, address: str) -> tuple[bool, Connection | None]:
        """Whether there is room for it, and which other connection must be closed to make that room."""
        network = f"{address} {id(connection)}" if self._is_exempt(address) else network_of(address)
        own = self._networks.get(network) or Group(self.most_per_address)
        spare = None
        if len(own.open) >= own.most or len(self._all.open) >= self._all.most:
            if (spare := self._spare(own)) is None:
                return False, None
            self.leave(spare)
        before = len(own.open)
        self._networks[network] = own
        self._network_of[connection] = network
        self._holders.move(network, before, before + 1)
        for group in (own, self._all):
            group.open.add(connection)
            group.new[connection] = None
        return True, spare

    def _spare(self, own: Group[Connection]) -> Connection | None:
        """Of the own address if it is at its limit or among those that hold the most, else of the largest."""
        if len(own.open) >= own.most:
            return own.spare(self._has_sent)
        largest = self._holders.largest
        first = own if largest is None or len(own.open) == self._holders.most else self._networks[largest]
        spare = first.spare(self._has_sent)
        return self._all.spare(self._has_sent) if spare is None else spare

    def work(self, connection: Connection) -> None:
        """It has sent a request."""
        for group in self._groups(connection):
            group.stop_waiting(connection)

    def rest(self, connection: Connection) -> None:
        """Its response has been sent."""
        for group in self._groups(connection):
            group.idle[connection] = None

    def leave(self, connection: Connection) -> None:
        for group in self._groups(connection):
            group.stop_waiting(connection)
            group.open.discard(connection)
        network = self._network_of.pop(connection, None)
        if network is None:
            return
        left = len(self._networks[network].open)
        self._holders.move(network, left + 1, left)
        if not left:
            del self._networks[network]

    def _groups(self, connection: Connection) -> tuple[Group[Connection], ...]:
        """None of a connection that was refused or has left."""
        network = self._network_of.get(connection)
        return () if network is None else (self._all, self._networks[network])
