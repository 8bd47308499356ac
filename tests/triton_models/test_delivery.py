"""Events reach their callers in order, on several threads, and nobody runs ahead of a slow one."""

import threading

import pytest

from triton_models.batcher import Event
from triton_models.delivery import THREADS, Delivery

WAIT_S = 10


def event(number: int) -> Event:
    """The number stands where the sequence would: delivery does not read it."""
    return Event(number, 7, -1.0, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", range(2 * THREADS + 2))
def test_every_event_is_told_once_and_each_round_after_the_one_before(count):
    told: list[Event] = []
    delivery = Delivery(told.append)
    rounds = [[event(100 * start + number) for number in range(count)] for start in range(3)]
    for each in rounds:
        delivery.hand_out(each)
    delivery.close()
    assert len(told) == 3 * count
    for start, each in enumerate(rounds):
        assert set(told[start * count : (start + 1) * count]) == set(each)


def test_events_of_one_round_are_told_side_by_side():
    together = threading.Barrier(THREADS)
    delivery = Delivery(lambda _: together.wait(WAIT_S) and None)
    delivery.hand_out([event(number) for number in range(THREADS)])
    delivery.close()
    assert not together.broken


def test_the_next_round_waits_for_the_one_before_and_the_caller_does_not_wait_for_its_own():
    gate, late, told = threading.Event(), threading.Event(), []

    def say(told_now: Event) -> None:
        if told_now.sequence == 0:
            gate.wait(WAIT_S)
        if told_now.sequence == 3:
            late.set()
        told.append(told_now.sequence)

    delivery = Delivery(say)
    delivery.hand_out([event(0), event(1)])  # returns although nobody opened the gate
    second = threading.Thread(target=delivery.hand_out, args=([event(2), event(3)],))
    second.start()
    assert not late.wait(0.2)
    assert second.is_alive()
    gate.set()
    second.join(WAIT_S)
    delivery.close()
    assert sorted(told[:2]) == [0, 1]
    assert sorted(told[2:]) == [2, 3]


def test_closing_tells_everything_first_and_ends_the_threads():
    before = set(threading.enumerate())
    gate, told = threading.Event(), []

    def say(told_now: Event) -> None:
        gate.wait(WAIT_S)
        told.append(told_now)

    delivery = Delivery(say)
    mine = set(threading.enumerate()) - before
    assert len(mine) == THREADS
    assert all(thread.daemon and thread.name.startswith("llm-delivery") for thread in mine)
    delivery.hand_out([event(0), event(1), event(2)])
    closing = threading.Thread(target=delivery.close)
    closing.start()
    gate.set()
    closing.join(WAIT_S)
    assert len(told) == 3
    assert not any(thread.is_alive() for thread in mine)
