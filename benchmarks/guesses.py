"""Guess keys and ids of images, and see whether one is right and whether the time tells anything.

    python -m benchmarks.guesses          # starts its own gateway and redis-server; needs redis-server on PATH

Half of the guesses are keys: with an id that no key has, and with the id of a real key and a wrong secret. Half are ids
of images: ones that nobody has, and those of images that another tenant keeps. Both kinds of a pair are sent in random
order over one connection. A rank-sum test (Mann-Whitney, normal approximation) says whether their times differ: with
p above 0.01 they tell nothing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np

from benchmarks.arguments import count
from benchmarks.bench.models import REFERENCE
from benchmarks.bench.systems import gateway
from benchmarks.figures import tell
from benchmarks.redis_lookups import redis_server
from build_engines.evaluation.accuracy import SCENES
from service.access.key_file import replace_file
from service.access.keys import KeyRecord, Keyring, new_key
from service.core.access import Scope

KEPT = 40  # images of the other tenant
WARM_UP = 50  # guesses of each kind before the measured ones


@dataclass(frozen=True)
class World:
    """A service with two tenants, and what the guesser does not know."""

    url: str
    guesser: str  # its key
    victim: str  # the other tenant's key
    images: Sequence[str]  # ids of the other tenant's


def make_keys(path: Path, *scopes: Scope) -> tuple[str, str]:
    """Write a file of two tenants' keys -> the keys. Without scopes they may ask and upload."""
    records, keys = [], []
    for tenant in ("guesser", "victim"):
        key, key_id, digest = new_key()
        records.append(KeyRecord(key_id, digest, tenant, frozenset(scopes or (Scope.ASK, Scope.UPLOAD)), time.time()))
        keys.append(key)
    replace_file(path, Keyring.of(records, {}).to_json())
    return keys[0], keys[1]


def world(url: str, guesser: str, victim: str) -> World:
    """Let the victim send its images."""
    files = sorted(SCENES.glob("*.webp"))[:KEPT]
    images = []
    for file in files:
        with closing(http.client.HTTPConnection(urlsplit(url).netloc)) as connection:
            status, said = sent(connection, "/v1/images", victim, file.read_bytes())
        if status != 200:
            raise RuntimeError(f"an image was answered with {status}: {said!r}")
        images.append(json.loads(said)["id"])
    return World(url, guesser, victim, images)


def sent(connection: http.client.HTTPConnection, path: str, key: str, body: bytes) -> tuple[int, bytes]:
    kind = "application/json" if path == "/v1/vqa" else "image/webp"
    connection.request("POST", path, body, {"content-type": kind, "authorization": f"Bearer {key}"})
    response = connection.getresponse()
    return response.status, response.read()


def question(image: str) -> bytes:
    return json.dumps({"image": image, "question": "how many objects are there?", "max_tokens": 1}).encode()


def unknown_id() -> str:
    return f"img_{secrets.token_hex(16)}"


def guesses(world: World) -> dict[str, tuple[int, dict[str, Callable[[], tuple[str, bytes]]]]]:
    """By pair: the status of a wrong guess, and what makes a key and a body of each kind."""
    prefix = world.victim[:13]  # glk_, the key's id, _
    unknown = question(unknown_id())
    return {
        "keys": (
            401,
            {
                "no key has the id": lambda: (new_key()[0], unknown),
                "another key has the id": lambda: (prefix + secrets.token_urlsafe(32), unknown),
            },
        ),
        "images": (
            404,
            {
                "nobody keeps it": lambda: (world.guesser, question(unknown_id())),
                "another tenant keeps it": lambda: (world.guesser, question(random.choice(world.images))),
            },
        ),
    }


def measure(world: World, count: int, warm_up: int = WARM_UP) -> dict[str, dict[str, object]]:
    """Make `count` guesses -> by pair, how many were right, and what their times tell."""
    figures: dict[str, dict[str, object]] = {}
    with closing(http.client.HTTPConnection(urlsplit(world.url).netloc, timeout=60)) as connection:
        for pair, (wrong, kinds) in guesses(world).items():
            took_us: dict[str, list[float]] = {name: [] for name in kinds}
            # Made before: what a guess takes to make would show in the time of the next answer.
            made = {name: [make() for _ in range(warm_up + count // 4)] for name, make in kinds.items()}
            right = 0
            for step in range(warm_up + count // 4):
                for name in random.sample([*kinds], len(kinds)):
                    key, body = made[name][step]
                    started = time.perf_counter()
                    status, _ = sent(connection, "/v1/vqa", key, body)
                    if step >= warm_up:
                        took_us[name].append((time.perf_counter() - started) * 1e6)
                    right += status != wrong
            one, other = took_us.values()
            figures[pair] = {
                "guesses": len(one) + len(other),
                "right": right,
                "p50_us": {name: round(statistics.median(times), 1) for name, times in took_us.items()},
                "p": round(rank_sum_p(one, other), 4),
            }
    return figures


def rank_sum_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the two-sided p of the Mann-Whitney test that both samples have the same distribution."""
    together = np.array([*one, *other])
    ranks = np.empty(len(together))
    ranks[together.argsort(kind="stable")] = np.arange(1, len(together) + 1)
    n, m = len(one), len(other)
    u = ranks[:n].sum() - n * (n + 1) / 2
    z = (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return math.erfc(abs(z) / math.sqrt(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guesses", type=count, default=10_000)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name, redis_server() as redis_url:
        folder = Path(name)
        guesser, victim = make_keys(folder / "keys.json")
        settings = {"KEYS": str(folder / "keys.json"), "REDIS_URL": redis_url, "METRICS_WITHOUT_KEY": "true"}
        with gateway(REFERENCE, folder, settings) as running:
            figures = measure(world(running.urls[0], guesser, victim), arguments.guesses)
    tell(figures, arguments.out)


if __name__ == "__main__":
    main()
