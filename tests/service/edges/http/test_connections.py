"""Which connection makes room for a new one."""

import pytest

from service.edges.http.connections import BURST_S, KEPT_RATES, Connections, Rates


def entered(connections: Connections[str], *names: str, address: str = "a") -> list[tuple[bool, str | None]]:
    return [connections.enter(name, address) for name in names]


def test_there_is_room_up_to_the_limit():
    connections: Connections[str] = Connections(2, 2, 10.0)
    assert entered(connections, "one", "two") == [(True, None)] * 2
    assert len(connections) == 2


def test_the_oldest_without_a_request_goes_first():
    connections: Connections[str] = Connections(3, 3, 10.0)
    entered(connections, "one", "two", "three")
    connections.work("one")
    assert entered(connections, "four", "five") == [(True, "two"), (True, "three")]
    assert len(connections) == 3


def test_one_that_never_sent_a_request_goes_before_one_that_did():
    connections: Connections[str] = Connections(2, 2, 10.0)
    entered(connections, "kept")
    connections.work("kept")
    connections.rest("kept")
    entered(connections, "new")
    assert entered(connections, "three") == [(True, "new")]
    connections.work("three")
    assert entered(connections, "four") == [(True, "kept")]


def test_of_those_that_did_the_one_that_rests_longest_goes():
    connections: Connections[str] = Connections(2, 2, 10.0)
    entered(connections, "one", "two")
    for name in ("one", "two"):
        connections.work(name)
    for name in ("two", "one"):
        connections.rest(name)
    assert entered(connections, "three") == [(True, "two")]


def test_work_is_never_interrupted():
    connections: Connections[str] = Connections(1, 1, 10.0)
    entered(connections, "one")
    connections.work("one")
    assert entered(connections, "two") == [(False, None)]
    connections.rest("two")  # it was refused
    connections.leave("two")
    assert len(connections) == 1
    connections.leave("one")
    assert entered(connections, "three") == [(True, None)]


def test_an_address_at_its_limit_makes_room_itself():
    connections: Connections[str] = Connections(3, 2, 10.0)
    entered(connections, "b1", address="b")
    entered(connections, "a1", "a2")
    assert entered(connections, "a3") == [(True, "a1")]
    for name in ("a2", "a3"):
        connections.work(name)
    assert entered(connections, "a4") == [(False, None)]
    assert entered(connections, "b2", address="b") == [(True, "b1")]


@pytest.mark.parametrize("times", [1, 2])
def test_what_has_left_is_forgotten(times):
    connections: Connections[str] = Connections(2, 1, 10.0)
    entered(connections, "one")
    for _ in range(times):
        connections.leave("one")
    assert len(connections) == 0
    assert entered(connections, "two") == [(True, None)]
    assert connections._addresses.keys() == {"a"}


def test_only_what_takes_anothers_place_is_bounded():
    connections: Connections[int] = Connections(50, 50, 0.1)
    for number in range(50):
        assert connections.admits("a", 0.0)
        connections.enter(number, "a")
    assert [connections.admits("a", 0.0) for _ in range(2)] == [True, False]
    assert connections.admits("b", 0.0)  # another address has its own rate
    connections.leave(7)
    assert [connections.admits("a", 0.0) for _ in range(3)] == [True] * 3
    assert not connections.admits("a", 0.0, coming=1)  # that one takes the free place


def test_an_address_at_its_limit_has_its_rate_too():
    connections: Connections[str] = Connections(9, 1, 0.1)
    entered(connections, "one")
    assert [connections.admits("a", 0.0) for _ in range(2)] == [True, False]
    assert [connections.admits("b", 0.0) for _ in range(2)] == [True, True]


def test_so_many_a_second_may_be_replaced_after_a_burst():
    rates = Rates(2.0)
    burst = round(2.0 * BURST_S)
    assert [rates.take("a", 5.0) for _ in range(burst + 1)] == [True] * burst + [False]
    assert [rates.take("a", 6.0) for _ in range(3)] == [True, True, False]
    assert [rates.take("a", 1000.0) for _ in range(burst + 1)] == [True] * burst + [False]


def test_a_network_of_ipv6_is_one_address():
    rates = Rates(0.01)
    assert rates.take("2001:db8:1:2::1", 0.0)
    assert not rates.take("2001:db8:1:2:ffff::9", 0.0)
    assert rates.take("2001:db8:1:3::1", 0.0)
    assert rates.take("::ffff:192.0.2.1", 0.0)
    assert not rates.take("192.0.2.1", 0.0)
    assert rates.take("::ffff:192.0.2.2", 0.0)
    assert rates.take("fe80::1%eth0", 0.0)


def test_rates_of_few_addresses_are_kept():
    rates = Rates(0.01)
    assert all(rates.take(f"10.0.{number // 256}.{number % 256}", 0.0) for number in range(KEPT_RATES + 1))
    assert rates.take("10.0.0.0", 0.0)  # forgotten
    assert not rates.take("10.0.0.9", 0.0)
