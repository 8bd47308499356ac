"""Requests begin a few in each turn of the event loop, in order."""

import asyncio
import time
from dataclasses import replace

import httpx
import pytest

from service.edges.http.application import http_api
from service.edges.loop_turns import AT_ONCE, LoopTurns
from tests.support.calls import question, served
from tests.support.fakes import House


class Crowd:
    """Requests that note in which turn of the loop they begin."""

    def __init__(self, count: int) -> None:
        self.turns = LoopTurns()
        self.turn = 0
        self.begun: list[tuple[int, int]] = []  # number of the request, and the loop's turn
        self.tasks = [asyncio.create_task(self.ask(number)) for number in range(count)]

    async def ask(self, number: int) -> None:
        await self.turns.next()
        self.begun.append((number, self.turn))

    async def count_turns(self) -> None:
        while not all(task.done() for task in self.tasks):
            self.turn += 1
            await asyncio.sleep(0)


async def test_a_crowd_begins_a_few_in_a_turn_and_in_order():
    crowd = Crowd(5 * AT_ONCE)
    await crowd.count_turns()
    assert [number for number, _ in crowd.begun] == list(range(5 * AT_ONCE))
    turns = [turn for _, turn in crowd.begun]
    assert max(turns.count(turn) for turn in set(turns)) == AT_ONCE
    assert crowd.turns.waited_s == 0.0


async def test_few_begin_at_once():
    turns = LoopTurns()
    for _ in range(3):
        for _ in range(AT_ONCE):
            beginning = turns.next()
            try:
                beginning.send(None)
            except StopIteration:
                continue
            raise AssertionError("it waited")
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_who_waits_is_told_how_long_it_has_been():
    crowd = Crowd(AT_ONCE + 1)
    await asyncio.sleep(0)
    time.sleep(0.01)  # noqa: ASYNC251  (the loop has no turn meanwhile)
    assert crowd.turns.waited_s >= 0.01
    assert len(crowd.begun) == AT_ONCE
    await asyncio.gather(*crowd.tasks)
    assert len(crowd.begun) == AT_ONCE + 1


async def test_a_request_that_is_cancelled_while_it_waits_leaves_its_place_to_the_next():
    crowd = Crowd(3 * AT_ONCE)
    await asyncio.sleep(0)
    for task in crowd.tasks[AT_ONCE:-1]:
        task.cancel()
    await asyncio.wait(crowd.tasks)
    assert [number for number, _ in crowd.begun] == [*range(AT_ONCE), 3 * AT_ONCE - 1]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await crowd.turns.next()  # the turns go on


async def test_a_question_takes_a_turn_and_its_wait_makes_the_service_late():
    house = House()
    caller = httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost")
    turns = house.edge.turns
    others = [asyncio.create_task(turns.next()) for _ in range(AT_ONCE)]
    asked = asyncio.create_task(caller.post("/v1/vqa", json={"question": "what colour?"}))
    for _ in range(100):  # turns of the loop until it has read the body
        if turns.waited_s:
            break
        await asyncio.sleep(0)
        others.append(asyncio.create_task(turns.next()))
    assert house.edge.lag_s() > 0.0
    assert (await asked).status_code == 400
    await asyncio.gather(*others)
    assert house.edge.lag_s() == 0.0
    await caller.aclose()
    house.reader.close()


class Counted(LoopTurns):
    taken = 0

    async def next(self) -> None:
        self.taken += 1
        await super().next()


@pytest.mark.parametrize("path", ["/v1/vqa", "/v1/vqa/estimate", "/v1/vqa/batch", "/v1/chat/completions"])
async def test_every_route_that_parses_questions_takes_one_turn(path):
    house = House()
    edge = replace(house.edge, turns=Counted())
    transport = httpx.ASGITransport(http_api(edge))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as caller:
        await caller.post(path, json={"question": "what colour?"})
    assert edge.turns.taken == 1
    house.reader.close()


async def test_a_question_over_grpc_takes_one_turn():
    house = House()
    house.rpc = replace(house.rpc, turns=Counted())
    async with served(house) as service:
        await service.stub.Answer(question())
    assert house.rpc.turns.taken == 1
