"""Which connection makes room for a new one."""

import pytest

from service.edges.http.connections import BURST_S, KEPT_RATES, Connections, Holders, Rates, network_of


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
    assert connections._networks.keys() == {"a"}
    assert connections._holders.most == 1


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


def test_the_address_that_holds_most_makes_room():
    connections: Connections[str] = Connections(7, 7, 10.0)
    entered(connections, "h1", address="h")  # has sent nothing, and is the oldest
    entered(connections, "a1", "a2", "a3", address="a")
    entered(connections, "b1", "b2", "b3", address="b")
    for name in ("b1", "b2", "b3"):
        connections.work(name)
        connections.rest(name)
    assert entered(connections, "h2", address="h") == [(True, "a1")]
    assert entered(connections, "h3", address="h") == [(True, "b1")]
    assert entered(connections, "b4", address="b") == [(True, "h1")]  # h holds the most now


def test_the_others_make_room_if_all_of_the_largest_address_work():
    connections: Connections[str] = Connections(3, 3, 10.0)
    entered(connections, "b1", address="b")
    entered(connections, "a1", "a2")
    for name in ("a1", "a2"):
        connections.work(name)
    assert entered(connections, "c1", address="c") == [(True, "b1")]


def test_one_that_has_just_sent_something_stays():
    sent = {"one", "three"}
    connections: Connections[str] = Connections(3, 3, 10.0, sent.__contains__)
    entered(connections, "one", "two", "three")
    assert entered(connections, "four", "five") == [(True, "two"), (True, "four")]
    sent.add("five")
    assert entered(connections, "six") == [(False, None)]
    sent.clear()
    assert entered(connections, "six") == [(True, "one")]


def test_an_address_that_holds_little_has_no_rate():
    connections: Connections[int] = Connections(40, 40, 0.1)
    for number in range(40):
        connections.enter(number, "a")
    number = 40
    while connections.admits("b", 0.0):
        assert connections.enter(number, "b")[1] in range(40)
        number += 1
    assert number - 40 == 40 // 3 + 1  # until it holds half as many as the other, and the one of its rate


def test_the_largest_is_known_as_addresses_grow_and_shrink():
    holders, held = Holders(), {"a": 0, "b": 0, "c": 0}
    for step in "+a+b+b+c+b-b-b+a-a-a-b-c".replace("+", " +").replace("-", " -").split():
        address, before = step[1], held[step[1]]
        held[address] += 1 if step[0] == "+" else -1
        holders.move(address, before, held[address])
        most = max(held.values())
        assert holders.most == most
        assert holders.largest in ({name for name, count in held.items() if count == most} if most else {None})


def test_so_many_a_second_may_be_replaced_after_a_burst():
    rates = Rates(2.0)
    burst = round(2.0 * BURST_S)
    assert [rates.take("a", 5.0) for _ in range(burst + 1)] == [True] * burst + [False]
    assert [rates.take("a", 6.0) for _ in range(3)] == [True, True, False]
    assert [rates.take("a", 1000.0) for _ in range(burst + 1)] == [True] * burst + [False]


def test_a_network_of_ipv6_is_one_address():
    assert network_of("2001:db8:1:2::1") == network_of("2001:db8:1:2:ffff::9") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") != network_of("::ffff:192.0.2.2")
    assert network_of("64:ff9b::192.0.2.1") == network_of("192.0.2.1") != network_of("64:ff9b::192.0.2.2")
    assert network_of("fe80::1%eth0") == network_of("fe80::2")
    connections: Connections[str] = Connections(9, 1, 10.0)
    entered(connections, "one", address="2001:db8:1:2::1")
    assert entered(connections, "two", address="2001:db8:1:2:ffff::9") == [(True, "one")]


def test_rates_of_few_addresses_are_kept():
    rates = Rates(0.01)
    assert all(rates.take(f"10.0.{number // 256}.{number % 256}", 0.0) for number in range(KEPT_RATES + 1))
    assert rates.take("10.0.0.0", 0.0)  # forgotten
    assert not rates.take("10.0.0.9", 0.0)


def test_the_limits_of_one_address_do_not_apply_to_a_proxy():
    connections: Connections[str] = Connections(4, 2, 0.001, is_exempt=lambda address: address == "proxy")
    assert entered(connections, "a", "b", "c", address="proxy") == [(True, None)] * 3
    assert entered(connections, "x", address="other") == [(True, None)]
    for _ in range(100):
        assert connections.admits("proxy", 0.0)
    assert entered(connections, "d", address="proxy") == [(True, "a")]  # all are taken: the oldest idle one goes
    for name in ("b", "c", "d", "x"):
        connections.work(name)
    assert entered(connections, "e", address="proxy") == [(False, None)]
    connections.leave("b")
    assert len(connections) == 3
    assert entered(connections, "f", address="proxy") == [(True, None)]
