"""Images that attack the decoder, sent to a real gateway in front of a real Triton."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.bombs import BOMBS
from tests.support.pictures import encoded, picture
from tests.support.servers import STOP_S, Gateway, StartGateway, eventually


@pytest.fixture
def stopping(start_gateway: StartGateway, triton) -> Iterator[Gateway]:
    """A gateway that is stopped within the test."""
    url = triton.access.url
    settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_STOP_GRACE_S": "1"}
    with start_gateway(settings) as gateway:
        yield gateway


def workers(gateway: Gateway) -> list[int]:
    """The process ids of its decoders."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if (
                int(parent) == gateway.process.pid
                and b"service.media.worker" in process.joinpath("cmdline").read_bytes()
            ):
                found.append(int(process.name))
    return found


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and bool(Path(f"/proc/{pid}/cmdline").read_bytes())


def upload(gateway: Gateway, data: bytes) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/images", content=data, timeout=60)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_gets_400_or_413_and_its_decoder_goes_on(gateway, name):
    before = workers(gateway)
    refused = upload(gateway, BOMBS[name]())
    assert refused.status_code in (400, 413)
    assert refused.json()["error"]["param"] == "image"
    assert workers(gateway) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_gateway_stops_while_its_decoders_hang_and_leaves_none_of_them(stopping, number):
    for width in (31, 32):  # they take turns, so both have started
        assert upload(stopping, encoded(picture(width, 29))).status_code == 200
    pids = workers(stopping)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    def send(width: int) -> None:
        with suppress(httpx.HTTPError):
            upload(stopping, encoded(picture(width, 30)))

    callers = [threading.Thread(target=send, args=(width,)) for width in range(40, 46)]
    for caller in callers:
        caller.start()
    eventually(lambda: used(stopping) >= 2, 10, "decoding")
    stopping.process.send_signal(number)
    status = stopping.process.wait(STOP_S)
    assert status == (0 if number == signal.SIGTERM else -number)
    eventually(lambda: not any(map(is_there, pids)), 5, "no decoder left")
    for caller in callers:
        caller.join(10)


def used(gateway: Gateway) -> float:
    """Vision slots that are held."""
    told = httpx.get(f"{gateway.url}/metrics", timeout=10).text.splitlines()
    (line,) = [line for line in told if line.startswith('glimpse_resource_used{resource="vision"')]
    return float(line.split()[-1])
