"""The hostile callers, in a process of their own: `python -m benchmarks.siege.attackers`.

It reads an Attack as JSON from standard input, says `begun` when every caller has connected once, goes on until
standard input ends, and then writes what became of the connections as JSON. An attacker whose connection ends opens
another one after a pause.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop

from benchmarks.bombs import png, scans
from benchmarks.fuzz.sending import request

SOURCES = [f"127.0.0.{number}" for number in range(2, 10)]  # addresses of this machine that attackers call from
ANNOUNCED_BYTES = 20_000_000
KINDS = ("idle", "half_heads", "endless_heads", "deaf", "announcers", "scan_bombs", "narrow_images")
PAUSE_S = 1.0  # after a connection has ended, and between two bombs
PIPELINED = 1000  # requests, sent at once
SAMPLE_S = 0.5
OTHER_FILES = 64


@dataclass(frozen=True, slots=True)
class Attack:
    """How many callers of each kind."""

    host: str
    port: int
    idle: int = 10_000  # one request each, then silence
    half_heads: int = 3_000  # incomplete headers (slowloris)
    endless_heads: int = 100
    deaf: int = 50  # clients that pipeline requests and never read
    announcers: int = 10  # of a body that never comes
    scan_bombs: int = 2
    narrow_images: int = 2
    niceness: int = 10  # added to this process's
    ramp_s: float = 8.0  # in which all callers call for the first time

    @property
    def connections(self) -> int:
        return sum(getattr(self, name) for name in KINDS)


@dataclass(slots=True)
class Tally:
    """What became of one kind's connections."""

    opened: int = 0
    failed_to_open: int = 0
    ended_by_service: int = 0
    open_now: int = 0
    most_open: int = 0
    answers: dict[str, int] = field(default_factory=dict)  # by status


class Caller(asyncio.Protocol):
    """One connection that says its lines, each after its pause, and then nothing."""

    def __init__(self, tally: Tally, lines: Iterator[tuple[float, bytes]], reads: bool = True) -> None:
        self.tally, self.lines, self.reads = tally, lines, reads
        self.ended = asyncio.get_running_loop().create_future()
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        self.tally.opened += 1
        self.tally.open_now += 1
        self.tally.most_open = max(self.tally.most_open, self.tally.open_now)
        if not self.reads:
            self.transport.pause_reading()
        self._say()

    def _say(self) -> None:
        pause_s, line = next(self.lines, (0.0, b""))
        if line and not self.transport.is_closing():
            try:
                self.transport.write(line)
            except RuntimeError:  # uvloop's, if the service ended the connection in this turn of the loop
                return
            self._next = asyncio.get_running_loop().call_later(pause_s, self._say)

    def data_received(self, data: bytes) -> None:
        for answer in data.split(b"HTTP/1.1 ")[1:]:
            status = answer[:3].decode(errors="replace")
            self.tally.answers[status] = self.tally.answers.get(status, 0) + 1

    def connection_lost(self, _: Exception | None) -> None:
        self.tally.open_now -= 1
        if self._next is not None:
            self._next.cancel()
        if not self.ended.done():
            self.ended.set_result(None)


def said_once(line: bytes) -> Iterator[tuple[float, bytes]]:
    yield 0.0, line


def said_repeatedly(line: bytes, pause_s: float) -> Iterator[tuple[float, bytes]]:
    while True:
        yield pause_s, line


def endless_head() -> Iterator[tuple[float, bytes]]:
    """Half of them one header that never ends, the others header after header."""
    yield 0.2, b"POST /v1/vqa HTTP/1.1\r\nhost: localhost\r\n"
    if random.random() < 0.5:
        yield 0.2, b"x-endless: "
        yield from said_repeatedly(b"a" * 1000, 0.2)
    number = 0
    while True:
        number += 1
        yield 0.2, b"x-%d: y\r\n" % number * 10


def kinds(attack: Attack) -> dict[str, tuple[int, Callable[[], Iterator[tuple[float, bytes]]], bool]]:
    """By name: how many callers, what each says, and whether it reads."""
    alive = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    metrics = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
    head = b"POST /v1/vqa HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    announced = head + b"content-length: %d\r\n\r\n" % ANNOUNCED_BYTES
    bomb = request("/v1/images", scans(7000, 7000, 4500), "image/jpeg")
    narrow = request("/v1/images", png(50_000_000, 1), "image/png")
    return {
        "idle": (attack.idle, lambda: said_once(alive), True),
        "half_heads": (attack.half_heads, lambda: said_once(head + b"x-half: "), True),
        "endless_heads": (attack.endless_heads, endless_head, True),
        "deaf": (attack.deaf, lambda: said_once(metrics * PIPELINED), False),
        "announcers": (attack.announcers, lambda: said_once(announced), True),
        "scan_bombs": (attack.scan_bombs, lambda: said_repeatedly(bomb, PAUSE_S), True),
        "narrow_images": (attack.narrow_images, lambda: said_repeatedly(narrow, PAUSE_S), True),
    }


async def run(attack: Attack, begun: Callable[[], None], stop: asyncio.Event) -> dict[str, object]:
    """Attack until `stop` is set; call `begun` when every caller has connected once or failed to. Returns tallies."""
    tallies: dict[str, Tally] = {}
    waiting, most_open = set(range(attack.connections)), 0  # callers that have not connected yet
    loop = asyncio.get_running_loop()

    async def call(number: int, tally: Tally, say: Callable[[], Iterator[tuple[float, bytes]]], reads: bool) -> None:
        """One connection, until it ends."""
        try:
            transport, made = await loop.create_connection(
                lambda: Caller(tally, say(), reads),
                attack.host,
                attack.port,
                local_addr=(SOURCES[number % len(SOURCES)], 0),
            )
        except OSError:
            tally.failed_to_open += 1
            return
        finally:
            waiting.discard(number)
        try:
            await made.ended
            tally.ended_by_service += 1
        finally:
            transport.abort()

    async def caller(number: int, tally: Tally, say: Callable[[], Iterator[tuple[float, bytes]]], reads: bool) -> None:
        await asyncio.sleep(random.uniform(0, attack.ramp_s))
        while True:
            await call(number, tally, say, reads)
            await asyncio.sleep(PAUSE_S)

    async def watch() -> None:
        nonlocal most_open
        said = False
        while not stop.is_set():
            most_open = max(most_open, sum(tally.open_now for tally in tallies.values()))
            if not waiting and not said:
                begun()
                said = True
            await asyncio.sleep(SAMPLE_S)

    callers: list[asyncio.Task[None]] = []
    for name, (count, say, reads) in kinds(attack).items():
        tallies[name] = Tally()
        for _ in range(count):
            callers.append(asyncio.create_task(caller(len(callers), tallies[name], say, reads)))
    await watch()
    for task in callers:
        task.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "most_open_at_once": most_open,
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "kinds": {name: asdict(tally) for name, tally in tallies.items()},
    }


async def run_until_told(attack: Attack) -> dict[str, object]:
    """Until standard input ends."""
    stop = asyncio.Event()

    def begun() -> None:
        sys.stdout.write("begun\n")
        sys.stdout.flush()

    async def listen() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    listening = asyncio.create_task(listen())
    found = await run(attack, begun, stop)
    await listening
    return found


def main() -> None:
    attack = Attack(**json.loads(sys.stdin.readline()))
    os.nice(attack.niceness)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < attack.connections + OTHER_FILES:
        sys.exit(f"{attack.connections:,} connections need as many open files; the hard limit is {hard:,}")
    sys.stdout.write(json.dumps(uvloop.run(run_until_told(attack))) + "\n")


if __name__ == "__main__":
    main()
