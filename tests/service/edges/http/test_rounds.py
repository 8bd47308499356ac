"""That every connection is visited in each interval, and never all of them at once."""

import asyncio
from collections import Counter

from service.edges.http.rounds import TURNS, Rounds

INTERVAL_S = 0.16


async def test_each_is_visited_once_in_an_interval_and_a_crowd_is_spread():
    loop = asyncio.get_running_loop()
    visits: list[tuple[float, int]] = []
    done = asyncio.Event()

    def visit(number: int, now: float) -> None:
        visits.append((now, number))
        if len(visits) == 300:
            done.set()

    rounds = Rounds(INTERVAL_S, visit)
    for number in range(100):
        rounds.add(number, loop.time())
    await asyncio.wait_for(done.wait(), 30)
    assert [number for _, number in visits] == [*range(100)] * 3
    for earlier, later in zip(visits, visits[100:], strict=False):
        assert later[0] - earlier[0] >= INTERVAL_S
    assert max(Counter(now for now, _ in visits).values()) <= 1 + 2 * 100 // TURNS


async def test_who_is_discarded_is_not_visited_and_one_that_fails_stops_no_other():
    loop = asyncio.get_running_loop()
    faults: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    visited = asyncio.Event()

    def visit(name: str, _: float) -> None:
        if name == "fails":
            raise ValueError(name)
        assert name != "gone"
        rounds.discard("gone")
        visited.set()

    rounds = Rounds(INTERVAL_S, visit)
    for name in ("fails", "stays", "gone"):
        rounds.add(name, loop.time() - INTERVAL_S)
    await asyncio.wait_for(visited.wait(), 30)
    assert [str(each["exception"]) for each in faults] == ["fails"]
