"""Measure the gateway's CPU time per request and per token of its answer.

    python -m benchmarks.gateway_cpu          # starts its own server, measures, stops it
    python -m benchmarks.gateway_cpu --model base --requests 24 --rounds 1

The load is a closed loop from this process. CPU time is read from /proc, so other load on the machine distorts it
little. Answers of 1 to 24 tokens are fitted by `ms a request + ms a token x tokens`, in three ways: follow-ups by image
id, streamed and whole; and new images, sent as a form and streamed. The time is that of the gateway's own process. The
report has apart the CPU time of its decoders and of Triton's own process, and that of an idle gateway, which watches
Triton and its models. The requests of a slow model include a share of that idle time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.arguments import count
from benchmarks.bench.http_client import HttpClient
from benchmarks.bench.load import form
from benchmarks.bench.models import BUILD, MODELS, ready
from benchmarks.bench.processes import DECODER, cpu_by_role
from benchmarks.bench.scenes import Scenes
from benchmarks.bench.systems import SYSTEMS, Running, running
from benchmarks.figures import tell
from service.media.decoder import ImageLimits, decode

QUESTION = "describe the image."  # its answer is long enough to be cut at any of LENGTHS
LENGTHS = (1, 6, 12, 18, 24)  # tokens of an answer
WAYS = ("follow_up streamed", "follow_up whole", "cold streamed")
IDLE_S = 20
CONFIGURED = {
    "VISUAL_CACHE_BYTES": "0",
    "LOG_LEVEL": "info",
}  # so that an equal question is not answered from the cache


@dataclass(frozen=True, slots=True)
class Spent:
    """Means per request of one measurement."""

    tokens: float
    ms: float  # CPU of the gateway's own process
    decoder_ms: float  # CPU of its decoders
    triton_ms: float  # CPU of Triton's own process, without its models' processes


class Load:
    """Run a closed loop of a few clients, each with its own connection."""

    def __init__(self, system: Running, clients: int) -> None:
        url = urlsplit(system.urls[0])
        self._http = HttpClient(url.hostname or "", url.port or 80)
        self._system = system
        self._clients = clients
        self._scenes = Scenes.load()
        self._new = itertools.count(len(self._scenes.files))
        self._ids: list[str] = []

    async def send_images(self) -> None:
        """Ask once about each image that follow-ups will be about."""
        for number in range(len(self._scenes.files)):
            body, kind = form({"question": QUESTION, "max_tokens": 1}, [self._scenes.jpeg(number)])
            self._ids += (await self._answer(body, kind))["image_ids"]

    async def spend(self, way: str, tokens: int, requests: int) -> Spent:
        """Send requests and measure their CPU time. Raises RuntimeError if a request fails."""
        asked = iter(range(requests))
        before, said = self._system.processes(), list[int]()

        async def client() -> None:
            for number in asked:
                answer = await self._answer(*self._question(way, tokens, number))
                said.append(answer["usage"]["completion_tokens"])

        await asyncio.gather(*(client() for _ in range(self._clients)))
        cpu_s = cpu_by_role(before, self._system.processes())
        ms = (cpu_s.get(role, 0.0) * 1e3 / requests for role in ("gateway", DECODER, "triton"))
        return Spent(sum(said) / requests, *ms)

    def _question(self, way: str, tokens: int, number: int) -> tuple[bytes, str]:
        """Return the request's body and content type."""
        fields = {"question": QUESTION, "max_tokens": tokens, "stream": way.endswith("streamed")}
        if way.startswith("cold"):
            return form(fields, [self._scenes.jpeg(next(self._new))])
        return json.dumps(fields | {"image": self._ids[number % len(self._ids)]}).encode(), "application/json"

    async def _answer(self, body: bytes, kind: str) -> dict[str, Any]:
        """Return all fields of the answer but its text. Raises RuntimeError if the request fails."""
        response = await self._http.post("/v1/vqa", body, kind)
        events = [line.removeprefix(b"data: ") for line in response.body.split(b"\n") if line and b"[DONE]" not in line]
        if response.status != 200 or b'"error"' in events[-1]:
            raise RuntimeError(f"{response.status}: {response.body[:500]!r}")
        found: dict[str, Any] = json.loads(events[-1])
        return found

    def close(self) -> None:
        self._http.close()


def fit(found: list[Spent]) -> dict[str, Any]:
    """Fit the measurements over the answers' lengths by least squares."""
    tokens, ms, decoder_ms, triton_ms = (np.array(each) for each in zip(*map(astuple, found), strict=True))
    a_token, a_request = np.polyfit(tokens, ms, 1)
    return {
        "ms_a_request": round(float(a_request), 2),
        "ms_a_token": round(float(a_token), 3),
        "decoder_ms_a_request": round(float(decoder_ms.mean()), 2),
        "triton_ms_a_request": round(float(np.polyfit(tokens, triton_ms, 1)[1]), 2),
        "measured": [[round(each.tokens, 1), round(each.ms, 2), round(each.triton_ms, 2)] for each in found],
    }


def decoding_ms() -> float:
    """Measure the CPU milliseconds of decoding one new image."""
    files = Scenes.load().files
    began = time.process_time()
    for file in files:
        decode(file, ImageLimits())
    return (time.process_time() - began) * 1e3 / len(files)


def idle_ms(system: Running) -> float:
    """Measure the idle gateway's CPU milliseconds per second."""
    before = system.processes()
    time.sleep(IDLE_S)
    return cpu_by_role(before, system.processes())["gateway"] * 1e3 / IDLE_S


async def measure(system: Running, clients: int, requests: int, rounds: int) -> dict[str, Any]:
    """Measure each length in turn and take the median of the rounds."""
    load = Load(system, clients)
    await load.send_images()
    found: dict[tuple[str, int], list[Spent]] = {(way, length): [] for way in WAYS for length in LENGTHS}
    for way, length in found:
        await load.spend(way, length, clients)  # warm
    for _ in range(rounds):
        for (way, length), each in found.items():
            each.append(await load.spend(way, length, requests))
    load.close()
    medians = {key: sorted(each, key=lambda spent: spent.ms)[len(each) // 2] for key, each in found.items()}
    return {way: fit([medians[way, length] for length in LENGTHS]) for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--clients", type=count, default=8)
    parser.add_argument("--requests", type=count, default=200, help="requests of each length and round")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    told = parser.parse_args()
    system = replace(SYSTEMS["glimpse"], settings=CONFIGURED)
    with running(system, ready(told.model), BUILD / "logs" / "gateway_cpu") as started:
        found = asyncio.run(measure(started, told.clients, told.requests, told.rounds))
        idle = idle_ms(started)
    report = {
        "model": told.model,
        "clients": told.clients,
        **found,
        "decoding alone, in this process, ms": round(decoding_ms(), 2),
        "idle, ms a second": round(idle, 1),
    }
    tell(report, told.out)


if __name__ == "__main__":
    main()
