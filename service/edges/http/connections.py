"""How many connections may be open, in all and from one address, and which of them makes room for a new one.

A connection that has no request in work is closed before a new one is refused. The first to go has never sent a whole
request, oldest first. The next has been idle longest. Pure: nothing here touches a socket.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Connection = TypeVar("Connection", bound=Hashable)


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


class Connections(Generic[Connection]):
    """The open connections of one server."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self.most_per_address = most_per_address
        self._all: Group[Connection] = Group(most)
        self._addresses: dict[str, Group[Connection]] = {}
        self._address_of: dict[Connection, str] = {}

    def __len__(self) -> int:
        return len(self._all.open)

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
