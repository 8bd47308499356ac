"""Send mutated images or bodies to a gateway of its own, and report what it may not do.

    python -m benchmarks.fuzz images --count 50000 --seed 1 --out benchmarks/results/fuzz_images.json
    python -m benchmarks.fuzz bodies --count 20000 --seed 1 --out benchmarks/results/fuzz_bodies.json
    python -m benchmarks.fuzz decoders --count 50000   # the images without HTTP: decoding workers alone
    python -m benchmarks.fuzz cost                     # CPU seconds of the costliest images of 20 MB
    python -m benchmarks.fuzz schema --examples 300    # schemathesis against the service's OpenAPI
    python -m benchmarks.fuzz --replay build/fuzz/1_4711.http

No answer may be a 5xx, take over 5 s or break the shape of errors; no process may die but a decoder at its limit of CPU
time; memory may grow by 2 % after the first 1,000 requests. A refusal for overload is tried again. A request that fails
is kept in build/fuzz with its seed and number. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import uvloop
from PIL import Image

from benchmarks.bench.http_client import HttpClient
from benchmarks.bench.models import PROJECT, REFERENCE
from benchmarks.bench.systems import gateway
from benchmarks.fuzz import bodies, cost, decoders, images, schema
from benchmarks.fuzz.campaign import Campaign, Make, Target, report_of, run
from benchmarks.fuzz.pictures import encoded, files, noise
from benchmarks.fuzz.sending import Mutant, request, send

FOLDER = PROJECT / "build" / "fuzz"
# Caches so small that they are full before memory is compared. A body that never comes ends soon.
SETTINGS = {
    "IMAGE_STORE_BYTES": str(24 * 1024 * 1024),
    "FEATURE_CACHE_BYTES": str(16 * 1024 * 1024),
    "VISUAL_CACHE_BYTES": str(4 * 1024 * 1024),
    "BODY_TIMEOUT_S": "2",
}


@contextmanager
def target() -> Iterator[Target]:
    """A gateway with its own Triton. Raises RuntimeError if it does not start."""
    with TemporaryDirectory() as folder, gateway(REFERENCE, Path(folder), SETTINGS) as running:
        url = urlsplit(running.urls[0])
        yield Target(url.hostname or "", url.port or 80, running.pids[0], Path(folder) / "gateway.log")


async def warm_up(to: Target) -> list[str]:
    """Fill the image store and the buffers of both decoding processes. Returns ids of small images."""
    client, ids = HttpClient(to.host, to.port), []
    large = encoded(Image.fromarray(noise(3000, 2000)), "PNG", compress_level=0)
    for number in range(4):
        await client.send(request("/v1/images", large + bytes(number), "image/png"))
    for name in ("PNG colours", "JPEG baseline", "WEBP lossy"):
        response = await client.send(request("/v1/images", files()[name], "image/png"))
        ids.append(str(json.loads(response.body)["id"]))
    client.close()
    return ids


async def mutants(kind: str, seed: int, count: int, connections: int) -> dict[str, Any]:
    with target() as to:
        ids = await warm_up(to)
        make: Make = images.mutant if kind == "images" else partial(bodies.mutant, image_ids=ids)
        campaign = Campaign(seed, FOLDER)
        wrong = await run(make, count, to, campaign, connections)
        return {"settings": SETTINGS, "connections": connections} | report_of(campaign, count, wrong, to)


async def replay(mutant: Mutant) -> dict[str, Any]:
    """Send one request again, to a gateway of its own."""
    with target() as to:
        await warm_up(to)
        client = HttpClient(to.host, to.port)
        outcome = await send(mutant, client)
        client.close()
        said = outcome.response.body[:2000].decode(errors="replace") if outcome.response else ""
        log = to.log.read_text(errors="replace")[-4000:]
    faults = [outcome.fault] if outcome.fault else []
    return {"word": outcome.word, "seconds": round(outcome.seconds, 2), "faults": faults, "said": said, "log": log}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("images", "bodies", "decoders", "cost", "schema"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000, help="mutants [1000]")
    parser.add_argument("--connections", type=int, default=8, help="kept open, each with one request at a time [8]")
    parser.add_argument("--examples", type=int, default=300, help="of schema: examples an operation [300]")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="send a kept request again")
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    told = parser.parse_args()
    if told.replay:
        kept = json.loads(told.replay.with_suffix(".json").read_text())
        report = uvloop.run(replay(Mutant(told.replay.read_bytes(), tuple(kept["done"]), kept["is_whole"])))
    elif told.kind in ("images", "bodies"):
        report = uvloop.run(mutants(told.kind, told.seed, told.count, told.connections))
    elif told.kind == "decoders":
        report = asyncio.run(decoders.run(told.seed, told.count, FOLDER))
    elif told.kind == "cost":
        report = asyncio.run(cost.measure())
    elif told.kind == "schema":
        with target() as to:
            report = schema.run(f"http://{to.host}:{to.port}", told.examples, told.seed, FOLDER)
    else:
        parser.error("name what to send, or --replay FILE")
    text = json.dumps(report, indent=2) + "\n"
    if told.out:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(text)
    sys.stdout.write(text)
    return 1 if report.get("faults") or report.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
