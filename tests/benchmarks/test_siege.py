"""Hostile callers do what their names say, and a small siege leaves honest clients alone."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.siege import attackers
from benchmarks.siege.attackers import KINDS, Attack, kinds
from tests.support.servers import Gateway

NOBODY = dict.fromkeys(KINDS, 0)


def said_by(name: str, lines: int) -> bytes:
    _, say, _ = kinds(Attack("localhost", 80))[name]
    spoken = say()
    return b"".join(line for line, _ in zip((line for _, line in spoken), range(lines), strict=False))


def test_the_attack_is_the_one_that_is_stated():
    attack = Attack("localhost", 80)
    assert {name: count for name, (count, _, _) in kinds(attack).items()} == {
        "idle": 10_000,
        "half_heads": 3_000,
        "endless_heads": 100,
        "deaf": 50,
        "announcers": 10,
        "scan_bombs": 2,
        "narrow_images": 2,
    }
    assert attack.connections == 13_164


def test_heads_do_not_end():
    assert b"\r\n\r\n" not in said_by("half_heads", 9)
    for _ in range(10):
        assert b"\r\n\r\n" not in said_by("endless_heads", 100)
        assert len(said_by("endless_heads", 100)) > 2000


def test_what_is_announced_does_not_come():
    head, body = said_by("announcers", 9).split(b"\r\n\r\n")
    assert b"content-length: 20000000" in head
    assert body == b""


@pytest.mark.parametrize("name", ["idle", "deaf"])
def test_others_send_whole_requests(name):
    assert said_by(name, 9).endswith(b"\r\n\r\n")


async def test_an_attack_has_begun_when_every_caller_has_connected():
    """Not when they begin to connect."""
    idle, accepted = 20, 0
    begun, stop = asyncio.Event(), asyncio.Event()
    loop, connect = asyncio.get_running_loop(), asyncio.get_running_loop().create_connection

    async def slowly(*args: object, **options: object) -> object:
        nonlocal accepted
        await asyncio.sleep(0.7)
        accepted += 1
        return await connect(*args, **options)

    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop.create_connection = slowly
    try:
        attack = Attack("127.0.0.1", port, **(NOBODY | {"idle": idle}), ramp_s=0.0)
        besieging = asyncio.create_task(attackers.run(attack, begun.set, stop))
        await asyncio.wait_for(begun.wait(), 30)
        assert accepted == idle
        stop.set()
        await besieging
    finally:
        del loop.create_connection
        server.close()


async def test_a_small_siege_leaves_honest_clients_alone(gateway: Gateway):
    url = urlsplit(gateway.url)
    few = {"idle": 60, "half_heads": 20, "endless_heads": 4, "deaf": 2, "announcers": 2, "scan_bombs": 1}
    attack = Attack(url.hostname or "", url.port or 80, **(NOBODY | few | {"narrow_images": 1}), ramp_s=1.0)
    stop, begun, statuses = asyncio.Event(), asyncio.Event(), []

    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as honest:
        besieging = asyncio.create_task(attackers.run(attack, begun.set, stop))
        while not begun.is_set():
            statuses.append((await honest.get("/health/ready")).status_code)
        stop.set()
        said = await besieging
        statuses.append((await honest.get("/health/live")).status_code)
    assert set(statuses) == {200}
    tallies = said["kinds"]
    assert [tallies[name]["failed_to_open"] for name in tallies] == [0] * len(tallies)
    assert tallies["idle"]["most_open"] == 60
    assert set(tallies["idle"]["answers"]) == {"200"}
    assert set(tallies["scan_bombs"]["answers"]) <= {"400"}
    assert set(tallies["narrow_images"]["answers"]) <= {"413"}
