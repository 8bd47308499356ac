"""Which connection makes room for a new one."""

import pytest

from service.edges.http.connections import Connections


def entered(connections: Connections[str], *names: str, address: str = "a") -> list[tuple[bool, str | None]]:
    return [connections.enter(name, address) for name in names]


def test_there_is_room_up_to_the_limit():
    connections: Connections[str] = Connections(2, 2)
    assert entered(connections, "one", "two") == [(True, None)] * 2
    assert len(connections) == 2


def test_the_oldest_without_a_request_goes_first():
    connections: Connections[str] = Connections(3, 3)
    entered(connections, "one", "two", "three")
    connections.work("one")
    assert entered(connections, "four", "five") == [(True, "two"), (True, "three")]
    assert len(connections) == 3


def test_one_that_never_sent_a_request_goes_before_one_that_did():
    connections: Connections[str] = Connections(2, 2)
    entered(connections, "kept")
    connections.work("kept")
    connections.rest("kept")
    entered(connections, "new")
    assert entered(connections, "three") == [(True, "new")]
    connections.work("three")
    assert entered(connections, "four") == [(True, "kept")]


def test_of_those_that_did_the_one_that_rests_longest_goes():
    connections: Connections[str] = Connections(2, 2)
    entered(connections, "one", "two")
    for name in ("one", "two"):
        connections.work(name)
    for name in ("two", "one"):
        connections.rest(name)
    assert entered(connections, "three") == [(True, "two")]


def test_work_is_never_interrupted():
    connections: Connections[str] = Connections(1, 1)
    entered(connections, "one")
    connections.work("one")
    assert entered(connections, "two") == [(False, None)]
    connections.rest("two")  # it was refused
    connections.leave("two")
    assert len(connections) == 1
    connections.leave("one")
    assert entered(connections, "three") == [(True, None)]


def test_an_address_at_its_limit_makes_room_itself():
    connections: Connections[str] = Connections(3, 2)
    entered(connections, "b1", address="b")
    entered(connections, "a1", "a2")
    assert entered(connections, "a3") == [(True, "a1")]
    for name in ("a2", "a3"):
        connections.work(name)
    assert entered(connections, "a4") == [(False, None)]
    assert entered(connections, "b2", address="b") == [(True, "b1")]


@pytest.mark.parametrize("times", [1, 2])
def test_what_has_left_is_forgotten(times):
    connections: Connections[str] = Connections(2, 1)
    entered(connections, "one")
    for _ in range(times):
        connections.leave("one")
    assert len(connections) == 0
    assert entered(connections, "two") == [(True, None)]
    assert connections._addresses.keys() == {"a"}
