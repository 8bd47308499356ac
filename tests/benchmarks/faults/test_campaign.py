"""Faults are drawn by seed, streams are read strictly, and a small campaign runs for real."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bench.scenes import Scenes
from benchmarks.faults.campaign import draw
from benchmarks.faults.catalogue import CATALOGUE, damaged
from benchmarks.faults.clients import Entry, Images, Question, read_stream
from benchmarks.faults.proxy import Proxy, Way
from benchmarks.faults.report import text
from benchmarks.ports import free_ports
from tests.support.paths import PROJECT

# One of each sort that is over soon: a process dies, a store lies, a link breaks, a caller is hostile, a disk is full.
SMALL = "model killed,Redis answers garbage,Triton connections reset,half heads,log disk full"


def test_a_seed_draws_the_same_faults_and_another_seed_draws_others() -> None:
    kinds = CATALOGUE.items()
    assert draw(7, 50, kinds) == draw(7, 50, kinds)
    assert draw(7, 50, kinds) != draw(8, 50, kinds)
    assert draw(7, 20, kinds) == draw(7, 50, kinds)[:20]


def test_every_kind_is_drawn_equally_often() -> None:
    drawn = Counter(fault.kind for fault in draw(3, 3 * len(CATALOGUE), CATALOGUE.items()))
    assert drawn == dict.fromkeys(CATALOGUE, 3)


def test_a_fault_lasts_as_long_as_its_kind_allows_and_chooses_for_itself() -> None:
    for fault in draw(5, 100, CATALOGUE.items()):
        least, most = CATALOGUE[fault.kind].hold_s
        assert least <= fault.hold_s <= most
    first, second = draw(5, 2, CATALOGUE.items())
    assert first.rng(5).random() == first.rng(5).random()
    assert first.rng(5).random() != second.rng(5).random()
    assert first.rng(5).random() != first.rng(6).random()


def events(*told: object) -> bytes:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in told]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


END = {"id": "vqa_1", "finish_reason": "stop"}
ERROR = {"error": {"code": "unavailable", "message": "the model llm does not answer"}}


@pytest.mark.parametrize(
    ("body", "outcome", "ends", "answer"),
    [
        (events({"delta": "a "}, {"delta": "circle"}, END, "[DONE]"), "ok", 1, "a circle"),
        (events({"delta": "a "}, ERROR, "[DONE]"), "unavailable", 1, "a "),
        (events({"delta": "a "}, END), "ok", 0, "a "),  # it was not closed
        (events({"delta": "a "}), "unended", 0, "a "),
        (events({"delta": "a "}, "[DONE]"), "unended", 1, "a "),
        (events(END, ERROR, "[DONE]"), "unavailable", 2, ""),
        (events(END, "[DONE]", "[DONE]"), "ok", 2, ""),
        (events(END, "[DONE]", {"delta": "more"}), "ok", 0, "more"),
    ],
)
def test_a_stream_has_one_end_and_nothing_behind_it(body: bytes, outcome: str, ends: int, answer: str) -> None:
    entry = Entry("a", "new", Question(0, "?", "low"), True, 0.0)
    read_stream(entry, body)
    assert (entry.outcome, entry.ends, entry.answer) == (outcome, ends, answer)


def test_no_gateway_is_sent_an_image_twice_and_each_gets_images_of_the_other() -> None:
    images = Images(Scenes([b"x"] * 6, [[]] * 6), random.Random(1))
    sent: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(200):
        for name, numbers in sent.items():
            numbers.append(images.next_for(name))
            images.answered(name, numbers[-1])
    for numbers in sent.values():
        assert len(set(numbers)) == len(numbers)
    assert len(set(sent["a"]) & set(sent["b"])) > 20


def test_a_damaged_record_is_another_one() -> None:
    record, other = bytes(range(256)) * 4, b"other"
    rng = random.Random(2)
    assert record not in [damaged(record, other, rng) for _ in range(200)]


async def test_the_proxy_passes_lies_freezes_and_cuts() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    port, server_port = free_ports(2)
    server = await asyncio.start_server(echo, "127.0.0.1", server_port)
    proxy = Proxy(port, server_port, random.Random(1))
    await proxy.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.become(Way.GARBAGE)
        writer.write(b"hello")
        assert await reader.readexactly(5) != b"hello"
        proxy.become(Way.FREEZES)
        writer.write(b"hello")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.read(5)
        proxy.become(Way.PASSES)
        assert await reader.readexactly(5) == b"hello"
        assert proxy.reset() == 2
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        proxy.become(Way.REFUSES)
        reader, _ = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    finally:
        await proxy.close()
        server.close()


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.needs("redis-server")
def test_a_small_campaign_breaks_nothing(tmp_path: Path) -> None:
    out = tmp_path / "faults"
    told = ["--seed", "11", "--count", "5", "--kinds", SMALL, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *told], cwd=PROJECT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert out.with_suffix(".json").exists(), done.stderr[-3000:]
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["violations"] == [], text(found)
    assert done.returncode == 0
    assert found["count"] == 5
    assert found["outcomes"]["ok"] > 50
    assert out.with_suffix(".png").stat().st_size > 10_000
