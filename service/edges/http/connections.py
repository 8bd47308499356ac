"""How many connections may be open, in all and from one address, and which of them makes room for a new one.

A connection that has no request in work is closed before a new one is refused. The first to go has never sent a whole
request, oldest first. The next has been idle longest. One address may replace a bounded number of connections a second:
whoever connects again as soon as it is closed would otherwise keep the event loop busy with that alone. Pure: nothing
here touches a socket, and time is an argument.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Connection = TypeVar("Connection", bound=Hashable)
BURST_S = 10.0  # so many seconds' worth of replacements may come at once
KEPT_RATES = 4096  # addresses whose rate is remembered; the one that came longest ago is forgotten first


@dataclass(slots=True)
class Group(Generic[Connection]):
    """Connections, all or those of one address. The dicts keep the order in which connections came to wait."""

    most: int
    open: set[Connection] = field(default_factory=set)
    new: dict[Connection, None] = field(default_factory=dict)  # no whole request yet
    idle: dict[Connection, None] = field(default_factory=dict)  # between two requests

    def spare(self) -> Connection | None:
        return next(iter(self.new or self.idle), None)

    def stop_waiting(self, connection: Connection) -> None:
        self.new.pop(connection, None)
        self.idle.pop(connection, None)


class Rates:
    """How many connections each address may still replace: a token bucket for each."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._most = max(1.0, per_s * BURST_S)
        self._left: dict[str, tuple[float, float]] = {}  # by network: tokens, and when there were so many

    def take(self, address: str, now: float) -> bool:
        """Whether it may replace one more at `now`, in seconds of any clock that does not go back."""
        network = network_of(address)
        left, since = self._left.pop(network, (self._most, now))
        left = min(self._most, left + (now - since) * self._per_s)
        taken = left >= 1
        self._left[network] = (left - taken, now)
        if len(self._left) > KEPT_RATES:
            del self._left[next(iter(self._left))]
        return taken


def network_of(address: str) -> str:
    """The address; of IPv6 its /64, which one customer has whole."""
    if ":" not in address:
        return address
    read = ipaddress.IPv6Address(address.partition("%")[0])
    return str(read.ipv4_mapped or read.packed[:8].hex())


class Connections(Generic[Connection]):
    """The open connections of one server."""

    def __init__(self, most: int, most_per_address: int, replaced_per_s: float) -> None:
        self.most_per_address = most_per_address
        self._rates = Rates(replaced_per_s)
        self._all: Group[Connection] = Group(most)
        self._addresses: dict[str, Group[Connection]] = {}
        self._address_of: dict[Connection, str] = {}

    def __len__(self) -> int:
        return len(self._all.open)

    def admits(self, address: str, now: float, coming: int = 0) -> bool:
        """Whether a new connection may come in, before anything is made for it. One that takes no other's place may.

        `coming` have been let in and have not entered yet.
        """
        its_address = self._addresses.get(address)
        of_address = coming + (len(its_address.open) if its_address else 0)
        if len(self._all.open) + coming < self._all.most and of_address < self.most_per_address:
            return True
        return self._rates.take(address, now)

    def enter(self, connection: Connection, address: str) -> tuple[bool, Connection | None]:
        """Whether there is room for it, and which other connection must be closed to make that room."""
        its_address = self._addresses.get(address) or Group(self.most_per_address)
        spare = None
        for group in (its_address, self._all):
            if len(group.open) >= group.most and spare is None:
                if (spare := group.spare()) is None:
                    return False, None
                self.leave(spare)
        self._addresses[address] = its_address
        self._address_of[connection] = address
        for group in (its_address, self._all):
            group.open.add(connection)
            group.new[connection] = None
        return True, spare

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
        address = self._address_of.pop(connection, None)
        if address is not None and not self._addresses[address].open:
            del self._addresses[address]

    def _groups(self, connection: Connection) -> tuple[Group[Connection], ...]:
        """None of a connection that was refused or has left."""
        address = self._address_of.get(connection)
        return () if address is None else (self._all, self._addresses[address])
