"""Send mutated images, clips or bodies to a gateway of its own, and report what it may not do.

    python -m benchmarks.fuzz images --count 50000 --seed 1 --out benchmarks/results/fuzz_images.json
    python -m benchmarks.fuzz clips --count 5000 --seed 1    # videos, and pages of documents
    python -m benchmarks.fuzz bodies --count 20000 --seed 1 --out benchmarks/results/fuzz_bodies.json
    python -m benchmarks.fuzz decoders --count 50000   # the images without HTTP: decoding workers alone
    python -m benchmarks.fuzz cost                     # CPU seconds of the costliest images of 20 MB
    python -m benchmarks.fuzz schema --examples 300    # schemathesis against the service's OpenAPI
    python -m benchmarks.fuzz schema --keys            # the same, of a service with keys
    python -m benchmarks.fuzz schema --keys --only /v1/images --phases fuzzing   # a part of it
    python -m benchmarks.fuzz --replay build/fuzz/1_4711.http

No answer may be a 5xx, take over 5 s or break the shape of errors; no process may die but a decoder at its limit of CPU
time; memory may grow by 2 % after the first 1,000 requests, which is checked if there are 3,000 or more. A refusal for
overload is tried again. A request that fails is kept in build/fuzz with its seed and number. Exit status 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks.arguments import count
from benchmarks.bench.http_client import HttpClient
from benchmarks.bench.load import form
from benchmarks.bench.models import PROJECT, REFERENCE
from benchmarks.bench.systems import System, running
from benchmarks.figures import tell
from benchmarks.fuzz import bodies, clips, cost, decoders, images, schema
from benchmarks.fuzz.campaign import Campaign, Make, Target, memory_unchecked, report_of, run
from benchmarks.fuzz.pictures import files
from benchmarks.fuzz.sending import Mutant, request, send
from benchmarks.guesses import make_keys
from service.core.access import Scope

FOLDER = PROJECT / "build" / "fuzz"
# Caches so small that they are full before memory is compared: the image store must hold one image, and mutants are
# smaller than this one. A body that never comes ends soon.
SETTINGS = {
    "MAX_IMAGE_BYTES": "2000000",
    "IMAGE_STORE_BYTES": "2100000",
    "FEATURE_CACHE_BYTES": str(4 * 1024 * 1024),
    "VISUAL_CACHE_BYTES": str(1024 * 1024),
    "BODY_TIMEOUT_S": "2",
}
PARAMETERS = {"llm": {"prefix_cache_bytes": str(1024 * 1024)}}
MANY = 6  # images; with more, the prompt leaves no room for an answer of 32 tokens
FULL_BATCH = 8  # frames, all encoded at once
WARM_QUESTIONS = 1000  # before the mutants, as few of those reach Triton


@contextmanager
def target(**settings: str) -> Iterator[Target]:
    """A gateway with its own Triton. Raises RuntimeError if it does not start."""
    system = System("glimpse", "small caches", SETTINGS | settings, PARAMETERS)
    with TemporaryDirectory() as folder, running(system, REFERENCE, Path(folder)) as started:
        url = urlsplit(started.urls[0])
        yield Target(url.hostname or "", url.port or 80, started.pids[0], Path(folder) / "gateway.log")


async def warm_up(to: Target, questions: int, connections: int) -> list[str]:
    """Ask questions about new images, so that every process has its buffers and every cache is full.

    Some have several images, or a clip that fills the encoder's batch, and longer answers. Returns ids of images,
    which stay known while questions name them. Raises RuntimeError if one is not answered.
    """
    client, ids = HttpClient(to.host, to.port), []
    pictures = [data for name, data in files().items() if not name.startswith("other")]
    numbers = iter(range(questions))

    async def ask() -> None:
        for number in numbers:
            name, count = ("frames", FULL_BATCH) if number % 40 == 0 else ("image", MANY if number % 20 == 0 else 1)
            fields = {"question": f"how many objects are there? ({number})", "stream": number % 2 == 0}
            fields["max_tokens"] = 4 if count == 1 else 32
            sent = [  # other bytes, the same pixels
                pictures[(number + each) % len(pictures)] + number.to_bytes(4, "big") for each in range(count)
            ]
            response = await client.post("/v1/vqa", *form(fields, sent, name))
            if response.status != 200:
                raise RuntimeError(f"a question before the campaign got {response.status}: {response.body[:500]!r}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(connections):
            tasks.create_task(ask())
    for name in ("PNG colours", "JPEG baseline", "WEBP lossy"):
        response = await client.send(request("/v1/images", files()[name], "image/png"))
        ids.append(str(json.loads(response.body)["id"]))
    client.close()
    return ids


async def mutants(kind: str, seed: int, count: int, connections: int) -> dict[str, Any]:
    with target() as to:
        ids = await warm_up(to, WARM_QUESTIONS, connections)
        makers: dict[str, Make] = {"images": images.mutant, "clips": clips.mutant}
        make = makers.get(kind) or partial(bodies.mutant, image_ids=ids)
        campaign = Campaign(seed, FOLDER)
        wrong = await run(make, count, to, campaign, connections)
        settings = {"settings": SETTINGS, "parameters": PARAMETERS, "questions_before": WARM_QUESTIONS}
        return settings | {"connections": connections} | report_of(campaign, count, wrong, to)


async def replay(mutant: Mutant) -> dict[str, Any]:
    """Send one request again, to a gateway of its own."""
    with target() as to:
        await warm_up(to, 0, 1)
        client = HttpClient(to.host, to.port)
        outcome = await send(mutant, client)
        client.close()
        said = outcome.response.body[:2000].decode(errors="replace") if outcome.response else ""
        log = to.log.read_text(errors="replace")[-4000:]
    faults = [outcome.fault] if outcome.fault else []
    return {"word": outcome.word, "seconds": round(outcome.seconds, 2), "faults": faults, "said": said, "log": log}


def against_schema(examples: int, seed: int, *, with_keys: bool, only: str, phases: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        key = make_keys(path, Scope.ADMIN)[0] if with_keys else ""
        with target(**({"KEYS": str(path)} if key else {})) as to:
            return schema.run(f"http://{to.host}:{to.port}", examples, seed, FOLDER, key, only=only, phases=phases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=("images", "clips", "bodies", "decoders", "cost", "schema"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=count, default=1000, help="mutants [1000]")
    parser.add_argument("--connections", type=count, default=8, help="kept open, each with one request at a time [8]")
    parser.add_argument("--examples", type=count, default=300, help="of schema: examples an operation [300]")
    parser.add_argument("--keys", action="store_true", help="of schema: ask a service with keys")
    parser.add_argument(
        "--only",
        default="",
        help="of cost: images whose name holds this text; of schema: operations whose path holds this regular "
        "expression [all]",
    )
    parser.add_argument("--phases", default=schema.PHASES, help=f"of schema: its phases [{schema.PHASES}]")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="send a kept request again")
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the gateway first
    if told.replay:
        kept = json.loads(told.replay.with_suffix(".json").read_text())
        report = uvloop.run(replay(Mutant(told.replay.read_bytes(), tuple(kept["done"]), kept["is_whole"])))
    elif told.kind in ("images", "clips", "bodies"):
        report = uvloop.run(mutants(told.kind, told.seed, told.count, told.connections))
        if unchecked := memory_unchecked(told.count):
            sys.stderr.write(f"\n{unchecked}\n")
    elif told.kind == "decoders":
        report = asyncio.run(decoders.run(told.seed, told.count, FOLDER))
    elif told.kind == "cost":
        report = asyncio.run(cost.measure(told.only))
    elif told.kind == "schema":
        report = against_schema(told.examples, told.seed, with_keys=told.keys, only=told.only, phases=told.phases)
    else:
        parser.error("name what to send, or --replay FILE")
    tell(report, told.out)
    return 1 if report.get("faults") or report.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
