"""What an administrator sees of the variants, and changes in the store that all gateways follow."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from structlog.testing import capture_logs

from service.core.errors import InvalidRequest, NotFound, Unavailable
from service.core.variant import VariantsChange
from service.system import files
from service.upstreams.control import Control
from service.upstreams.fleet import Fleet
from service.upstreams.store import FixedVariants, VariantsFile, VariantsInRedis
from service.upstreams.variants import Variants, VariantsError
from tests.service.upstreams.test_fleet import PORTS, running, two, variant
from tests.support.fakes import until
from tests.support.servers import StartRedis

WHO = {"tenant": "ops", "key": "0a1b2c3d", "request_id": "r1"}


@pytest.fixture
def file(tmp_path: Path, repository: Path) -> VariantsFile:
    store = VariantsFile(tmp_path / "variants.json")
    store.path.write_bytes(two(repository).to_json())
    return store


async def test_a_change_is_written_logged_and_followed(file):
    async with running(VariantsFile(file.path)) as fleet:
        control = Control(fleet)
        pools = [each.pool for each in fleet.running.values()]
        await until(lambda: all(pool.addresses and not pool.faults() for pool in pools))  # each was found and probed
        fleet.models.models[0].in_flight += 2
        with capture_logs() as logs:
            told = await control.change(VariantsChange({"stable": 30, "next": 10}, {}), **WHO)
            await control.change(VariantsChange({}, {"next": True}), **WHO)
        stable, following = told
        assert (stable.name, stable.weight, stable.share, stable.in_flight) == ("stable", 30, 0.75, 2)
        assert (stable.tritons, stable.tritons_out, following.share) == (1, 0, 0.25)
        assert stable.model == fleet.primary.repository.card.name
        kept = (await file.loaded()).variants
        assert {name: (each.weight, each.is_draining) for name, each in kept.items()} == {
            "stable": (30, False),
            "next": (10, True),
        }
        changes = [line for line in logs if line["event"] == "variants_changed"]
        assert [(line["before"], line["after"]) for line in changes] == [
            ("stable=1 next=1", "stable=30 next=10"),
            ("stable=30 next=10", "stable=30 next=10 (draining)"),
        ]
        assert all(line.items() >= WHO.items() for line in changes)
        await until(lambda: fleet.names == ["stable"])
        assert [(each.weight, each.is_draining) for each in control.states()] == [(30, False), (10, True)]


@pytest.mark.parametrize(
    ("weights", "draining", "error", "code", "param"),
    [
        ({"stable": 5, "nobody": 1}, {}, NotFound, "unknown_variant", "weights.nobody"),
        ({"stable": 5}, {"nobody": True}, NotFound, "unknown_variant", "draining.nobody"),
        ({"stable": 0, "next": 0}, {}, InvalidRequest, "no_variant_left", None),
        ({"stable": 0}, {"next": True}, InvalidRequest, "no_variant_left", None),
        ({}, {"stable": True, "next": True}, InvalidRequest, "no_variant_left", None),
    ],
)
async def test_what_is_wrong_changes_nothing_at_all(file, weights, draining, error, code, param):
    async with running(file) as fleet:
        before = file.path.read_bytes()
        with pytest.raises(error) as caught:
            await Control(fleet).change(VariantsChange(weights, draining), **WHO)
        assert (caught.value.code, caught.value.param) == (code, param)
        assert file.path.read_bytes() == before


async def test_a_store_that_cannot_be_written_is_said_without_its_place(file, monkeypatch):
    async with running(VariantsFile(file.path)) as fleet:
        control = Control(fleet)

        async def refused() -> Unavailable:
            with capture_logs() as logs, pytest.raises(Unavailable) as caught:
                await control.change(VariantsChange({"stable": 5}), **WHO)
            (line,) = [line for line in logs if line["event"] == "variants_not_changed"]
            assert line["reason"] == caught.value.cause
            assert str(file.path) not in caught.value.message
            return caught.value

        monkeypatch.setattr(files, "LOCK_S", 0.05)
        with file.path.with_name(".variants.json.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "is locked by another command" in (await refused()).cause
        file.path.write_text("{")
        assert "not JSON" in (await refused()).cause
        file.path.write_bytes(Variants().to_json())
        assert "no variants any more" in (await refused()).cause
        file.path.unlink()
        assert "no variants any more" in (await refused()).cause
        lock_path = file.path.with_name(".variants.json.lock")
        lock_path.unlink()
        lock_path.mkdir()
        assert "cannot be written" in (await refused()).cause
        assert fleet.names == ["stable", "next"]  # it goes on with the last ones


async def test_changes_that_wait_for_the_lock_hold_no_thread(file, monkeypatch):
    """More of them than the pool of threads has: the file is still followed."""
    monkeypatch.setattr(files, "LOCK_S", 60.0)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    with file.path.with_name(".variants.json.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [asyncio.create_task(file.change(lambda before: before)) for _ in range(3)]
        await asyncio.sleep(0)  # they begin
        async with asyncio.timeout(10):
            assert (await VariantsFile(file.path).loaded()).variants
        assert not any(each.done() for each in waiting)
    await asyncio.gather(*waiting)


@pytest.mark.parametrize(("folder_mode", "mode"), [(0o755, 0o600), (0o775, 0o660), (0o777, 0o666), (0o1777, 0o666)])
def test_whoever_may_write_the_folder_may_lock_and_nobody_else(tmp_path, folder_mode, mode):
    tmp_path.chmod(folder_mode)
    lock_path = tmp_path / ".variants.json.lock"
    for before in (None, 0o644):  # as earlier releases left it
        if before is not None:
            lock_path.chmod(before)
        umask = os.umask(0o077)
        try:
            asyncio.run(VariantsFile(tmp_path / "variants.json").change(lambda before: before))
        finally:
            os.umask(umask)
        lock, folder = lock_path.stat(), tmp_path.stat()
        assert (lock.st_uid, lock.st_gid, lock.st_mode & 0o777) == (folder.st_uid, folder.st_gid, mode)


CHANGE_AS_ANOTHER = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from service.upstreams.store import VariantsFile
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
asyncio.run(VariantsFile(Path(sys.argv[1])).change(lambda before: before))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize(("owner", "mode"), [(65534, 0o700), (0, 0o777)])
def test_a_gateway_of_another_user_changes_what_root_wrote(owner, mode):
    with TemporaryDirectory() as folder:  # pytest's folders are this user's alone
        os.chown(folder, owner, owner)
        Path(folder).chmod(mode)
        path = Path(folder) / "variants.json"
        asyncio.run(VariantsFile(path).change(lambda before: before))
        path.chmod(0o644)
        if not owner:
            path.with_name(".variants.json.lock").chmod(0o444)  # nobody else may write it
        command = [sys.executable, "-c", CHANGE_AS_ANOTHER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert path.stat().st_uid == 65534


async def test_changes_at_the_same_time_all_count(tmp_path, repository, start_redis: StartRedis):
    """Twelve in the file, and twelve in Redis: none writes over another."""
    redis = start_redis()
    many = Variants({f"v{number}": variant("stable", repository) for number in range(12)})
    many = Variants.from_json(many.to_json())
    for stores in (
        [VariantsFile(tmp_path / "variants.json") for _ in range(12)],
        [VariantsInRedis(redis.url) for _ in range(12)],
    ):
        await stores[0].change(lambda _: many)
        await asyncio.gather(
            *(
                each.change(lambda found, number=number: found.changed({f"v{number}": 100 + number}, {}))
                for number, each in enumerate(stores)
            )
        )
        kept = (await stores[0].loaded()).variants.values()
        assert [each.weight for each in kept] == [100 + number for number in range(12)]


async def test_redis_that_is_gone_or_emptied_is_unavailable(repository, start_redis: StartRedis):
    redis = start_redis()
    await VariantsInRedis(redis.url).change(lambda _: two(repository))
    async with running(VariantsInRedis(redis.url)) as fleet:
        control = Control(fleet)
        await control.change(VariantsChange({"stable": 9}), **WHO)
        await until(lambda: control.states()[0].weight == 9)
        redis.client.flushall()
        with pytest.raises(Unavailable):
            await control.change(VariantsChange({"stable": 5}), **WHO)
        redis.kill()
        with pytest.raises(Unavailable) as caught:
            await control.change(VariantsChange({"stable": 5}), **WHO)
        assert str(redis.port) not in caught.value.message
        assert control.states()[0].weight == 9


async def test_a_variant_that_this_gateway_has_not_read_yet_is_told_too(file, repository):
    async with running(file) as fleet:
        added = variant("third", repository.parent / "not there", 2)
        await VariantsFile(file.path).change(lambda before: before.added(added))
        told = await Control(fleet).change(VariantsChange({"third": 4}), **WHO)
        assert (told[2].name, told[2].weight, told[2].model, told[2].tritons) == ("third", 4, "", 0)


async def test_tritons_of_the_settings_are_no_variants_to_change():
    with pytest.raises(VariantsError, match="GLIMPSE_VISION_URL"):
        await FixedVariants(Variants()).change(lambda before: before)


async def test_what_cannot_be_used_stays_told_until_it_can(file, repository, tmp_path, monkeypatch):
    """A file that is broken, or names models that are not there, is no passing trouble."""
    monkeypatch.setattr("service.upstreams.fleet.LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr("service.upstreams.fleet.RETRY_S", 0.02)
    late = tmp_path / "late"
    async with running(VariantsFile(file.path)) as fleet:
        for wrong in (b"{", two(repository).added(variant("third", late)).to_json()):
            file.path.write_bytes(wrong)
            await until(lambda: fleet.metric("variants_readable") == 0)
            looks = await looked(fleet, 5)
            assert looks == {0}
        os.symlink(repository, late)  # the models arrive after the variant that names them
        await until(lambda: "third" in fleet.names)
        await until(lambda: fleet.metric("variants_readable") == 1)
        await until(lambda: PORTS["third"] in fleet.tritons and fleet.tritons[PORTS["third"]].is_open)


async def looked(fleet: Fleet, times: int) -> set[float | None]:
    """The metric after each of so many looks at the store."""
    found: list[float | None] = []
    look = fleet.store.changed

    async def counted() -> Variants | None:
        found.append(fleet.metric("variants_readable"))
        return await look()

    fleet.store.changed = counted
    await until(lambda: len(found) > times)
    fleet.store.changed = look
    return set(found[1:])
