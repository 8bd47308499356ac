"""Ask as many tenants in rotation, each time of a service that has met no other tenant.

A service that has met 10,000 tenants before would cost as much with one. So each point starts a service of its own.
Every tenant sends a picture first; the service's features of them are known, and each question is a follow-up.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bench.models import REFERENCE
from benchmarks.bench.systems import Running, gateway
from benchmarks.growth.curves import Curve, Figures, Found, schedule, steps
from benchmarks.growth.served import (
    A_FOLLOW_UP,
    KNOWN,
    ONE,
    SETTINGS,
    Ask,
    Asker,
    Load,
    tell_point,
)
from service.access.keys import KeyRecord, Keyring, new_key
from service.core.access import Scope
from service.system.files import replace_file

AT_ONCE = 8  # tenants that send their picture at the same time
WARM_UP = 30  # questions before the measured ones
# With keys: each tenant has quotas that it never reaches, so that they are counted. Without sharing, the first question
# of every tenant would need an encode.
WITH_KEYS = {
    "SHARE_FEATURES": "true",
    "QUOTA_REQUESTS_PER_MINUTE": "1000000",
    "QUOTA_IMAGES_PER_MINUTE": "1000000",
    "QUOTA_GENERATED_TOKENS_PER_MINUTE": "1000000",
    "QUOTA_CONCURRENT_REQUESTS": "1000",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTenants(Curve):
    has_keys: bool


@dataclass(frozen=True, slots=True)
class Tenant:
    headers: Mapping[str, str]  # with the tenant's name or key
    image: str = ""  # the id of its picture


def by_name(count: int) -> list[Tenant]:
    return [Tenant({"x-tenant-id": f"tenant-{number}"}) for number in range(count)]


def by_key(count: int, path: Path) -> list[Tenant]:
    """Write a file of one key a tenant."""
    keys = [new_key() for _ in range(count)]
    scopes = frozenset({Scope.ASK, Scope.UPLOAD})
    records = [KeyRecord(key_id, digest, f"tenant-{key_id}", scopes, time.time()) for _, key_id, digest in keys]
    replace_file(path, Keyring.of(records, {}).to_json())
    return [Tenant({"authorization": f"Bearer {key}"}) for key, _, _ in keys]


async def introduced(asker: Asker, tenants: Sequence[Tenant]) -> list[Tenant]:
    """Send each tenant's picture -> the tenants with its id. All pictures' features are known then."""
    found: dict[int, Tenant] = {}
    numbers = iter(range(len(tenants)))

    async def send() -> None:
        for number in numbers:
            headers = tenants[number].headers
            kept = await asker.post("/v1/images", asker.scenes.jpeg(number % KNOWN), "image/jpeg", headers)
            found[number] = Tenant(headers, kept["id"])

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(send())
    in_order = [found[number] for number in range(len(tenants))]
    for tenant in in_order[:KNOWN]:
        await asker.answer(asker.about([tenant.image], cache="", headers=tenant.headers))
    return in_order


def in_rotation(asker: Asker, tenants: Sequence[Tenant]) -> Load:
    turns = itertools.cycle(tenants)

    def make() -> Ask:
        tenant = next(turns)
        return asker.about([tenant.image], headers=tenant.headers)

    return Load(make)


async def spend(system: Running, tenants: Sequence[Tenant], seconds: float, seed: int) -> Figures:
    asker = Asker(system, seed)
    load = in_rotation(asker, await introduced(asker, tenants))
    for _ in range(WARM_UP):
        await asker.answer(load.make())
    figures = await asker.spend(load, seconds)
    asker.close()
    return figures


@contextmanager
def serving(count: int, *, has_keys: bool) -> Iterator[tuple[Running, list[Tenant]]]:
    """Start a service that knows the keys of so many tenants, or none."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if has_keys:
            tenants, settings = by_key(count, folder / "keys.json"), {"KEYS": str(folder / "keys.json"), **WITH_KEYS}
        else:
            tenants, settings = by_name(count), {}
        with gateway(REFERENCE, folder, SETTINGS | settings) as system:
            yield system, tenants


def measure(curves: Sequence[OfTenants], rounds: int, seconds: float, seed: int) -> dict[tuple[str, str], Found]:
    """Measure all points of these curves -> figures by curve, size and round."""
    found: dict[tuple[str, str], Found] = {curve.key: {size: [] for size in curve.sizes} for curve in curves}
    for curve, size in schedule(curves, rounds, seed):
        with serving(size, has_keys=curve.has_keys) as (system, tenants):
            figures = asyncio.run(spend(system, tenants, seconds, seed))
        found[curve.key][size].append(figures)
        tell_point(curve, size, figures)
    return found


CURVES = tuple(
    OfTenants(axis="tenants", name=name, sizes=steps(1, 10_000, 5), counted="tenants in rotation",
              causes={"p50_ms": 0, "p95_ms": 0, "gateway_cpu_ms": 0, "triton_cpu_ms": 0},
              holds=f"{ONE}, {A_FOLLOW_UP}", has_keys=has_keys)
    for name, has_keys in (("by name", False), ("by key, with quotas", True))
)  # fmt: skip
